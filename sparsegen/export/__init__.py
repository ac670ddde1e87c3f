"""Write and open bundles that run without the compiler."""
