"""The stages one request passes, one file each."""
