"""Jobs over many texts: file in, file out."""
