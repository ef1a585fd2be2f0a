"""The names of what can be imported, for command lines that read nothing yet."""

from typing import Literal

DatasetName = Literal["ssv2", "k400", "ucf101", "hmdb51", "diving48", "epic55"]
LabelKind = Literal["action", "verb", "noun"]  # of a segment of EPIC-KITCHENS
