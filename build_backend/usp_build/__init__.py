"""How usp is built: setuptools does the packaging, this adds the compiled extension."""
