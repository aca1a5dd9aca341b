"""How the attention op is computed on each kind of device: one file per lowering behind one small contract."""
