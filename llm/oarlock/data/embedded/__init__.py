"""The default data: real text and instructions that need no download, because Python comes with them."""
