"""A converted data set → one page that shows whether it is right. Begin with `__main__.py`."""
