"""From texts and a question to members and thresholds in the bundle; and the quality of a cascade on labelled texts.

`collect` runs the members, `operating_points` measures and chooses, `certify` guarantees, `tune` puts them together and
writes the bundle, `report` is what it answers, `plot` draws it. `evaluation` and `metrics` measure labelled texts.
"""
