"""FX graph in, FX graph out: capture, match, prove, rewrite. No kernels and no devices here."""
