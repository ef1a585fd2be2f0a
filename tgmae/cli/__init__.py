"""Console scripts: `tgmae-train`, `tgmae-data`, `tgmae-info`."""
