"""The one place that knows the version; read by the build without importing torch."""

__version__ = "0.1.0.dev0"
