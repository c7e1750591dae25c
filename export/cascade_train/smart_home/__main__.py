"""`python -m cascade_train.smart_home train|tuning|heldout [direct|indirect]` prints that part as TSV with a header."""

import sys

from cascade_rt.errors import CascadeError
from cascade_train.smart_home import load

try:
    rows = load(*sys.argv[1:3]) if len(sys.argv) > 1 else sys.exit(__doc__)
except CascadeError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
print("text\tlabel")
for text, label in rows:
    print(f"{text}\t{label}")
