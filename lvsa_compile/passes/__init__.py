"""The passes of the compiler: find attention, trace the token layout, decide, rewrite, verify."""
