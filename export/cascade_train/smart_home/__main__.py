"""`python -m cascade_train.smart_home train|heldout [direct|indirect]` prints that part as TSV with a header."""

import sys

from cascade_train.smart_home import load

print("text\tlabel")
for text, label in load(sys.argv[1], *sys.argv[2:3]):
    print(f"{text}\t{label}")
