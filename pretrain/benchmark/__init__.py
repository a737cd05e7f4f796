"""Speed and size, measured with the code that trains."""
