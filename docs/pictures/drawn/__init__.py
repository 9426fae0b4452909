"""One module for each picture of docs/quality.md, over the shapes they share."""
