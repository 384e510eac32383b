"""Types of command-line arguments."""

import argparse


def positive(number: type):
    def convert(text: str):
        if number(text) <= 0:
            raise argparse.ArgumentTypeError(f"must be positive, but got {text}")
        return number(text)

    convert.__name__ = f"positive {number.__name__}"
    return convert
