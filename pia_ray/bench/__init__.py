"""The benchmark card of `pia-ray bench`, and the resident diffusers pipeline that it compares with."""
