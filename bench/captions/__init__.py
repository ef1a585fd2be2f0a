"""How fast frames reach a captioner."""
