"""Folders of images: found, looked through, cached. Nothing here needs torch."""
