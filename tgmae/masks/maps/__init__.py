"""Maps of whole videos on disk, computed once and read clip by clip."""
