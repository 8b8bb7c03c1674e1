"""Pure tensor functions, which know neither names nor configurations."""
