"""From the official annotation files of published data sets and a folder of videos to a manifest."""
