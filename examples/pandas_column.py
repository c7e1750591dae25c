"""Add the columns `prediction` and `exit` to a CSV file with pandas.

python examples/pandas_column.py runs/demo/bundle examples/commands.csv predictions.csv
"""

import argparse

import pandas as pd

from cascade_rt import CascadeRuntime


def main() -> None:
    """Read the CSV file, classify one column, write the CSV file."""
    parser = argparse.ArgumentParser(description="Add the columns `prediction` and `exit` to a CSV file.")
    parser.add_argument("bundle")
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--column", default="text", help="the column with the texts (default: text)")
    args = parser.parse_args()

    table = pd.read_csv(args.input, dtype=str, keep_default_na=False)  # the texts "NA" and "007" stay as they are
    with CascadeRuntime(args.bundle) as runtime:
        predictions = runtime.predict(table[args.column])
    table["prediction"] = [prediction.label for prediction in predictions]
    table["exit"] = [prediction.exit for prediction in predictions]
    table.to_csv(args.output, index=False)


if __name__ == "__main__":
    main()
