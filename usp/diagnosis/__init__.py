"""What is seen while it runs: whether ranks compute and talk rightly, and when they do what."""
