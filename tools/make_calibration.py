"""Write the calibration texts that ship with m2dexport: sentences composed here, free of licences.

    python tools/make_calibration.py > m2dexport/data/calibration.txt

They only have to cover a model's space: int8 ranges from them clip less than 1% of the values of
real text (the ``clipped`` column of docs/vectors.md).
"""

from __future__ import annotations

import argparse
import random

COUNT = 1000
SEED = 0

WHO = """
a man|two women|the old teacher|three children|our neighbour|the minister of finance|a black
dog|the engineers|a group of tourists|my grandmother|the striker|a small bird|the
committee|several farmers|the young doctor|an angry customer|the orchestra|police officers|a
student from Lagos|the captain|scientists in Geneva|the company|a sleepy cat|volunteers|the
judge|Maria|the president of the club|an elephant|the baker|investors
"""
DID = """
is playing the guitar|was repairing an engine|announced higher prices|ran along the
beach|cut the onions into thin slices|won the final by two goals|lost most of their
savings|discovered a new kind of beetle|refused to answer the question|is riding a
horse|painted the kitchen wall green|sold eleven thousand shares|crossed the frozen
river|asked for a second opinion|is sleeping on the sofa|delivered the parcels late|signed
the peace agreement|wrote a long letter|cannot open the file|bought cheap tickets to
Lisbon|planted apple trees|broke the world record|is jumping into the pool|closed the
factory|studied the effect of sleep on memory|lit a fire|translated the poem into
Polish|measured the distance to the moon|cooked rice with beans|fixed the security hole
"""
WHEN = """
in the early morning|after the storm|last Tuesday|before the election|near the railway
station|in 1987|during the second half|without any warning|at the end of the quarter|on a
snowy mountain|in front of a large crowd|despite the heavy rain|for the third time this
year|at home|in the hospital|because the road was blocked|with great care|under
water|according to the report|while the band was singing
"""
TOPIC = """
the capital of Norway|a healthy breakfast|interest rates|how vaccines work|the rules of
chess|cheap hotels in Rome|the history of the telescope|black holes|a broken phone
screen|income tax|the best hiking boots|sorting a list in Python|the French revolution|solar
panels|dog training|the symptoms of flu|jazz music|climate change|a used bicycle|the speed
of light|coral reefs|job interviews|the World Cup|bread without yeast|electric cars|the
human heart
"""
ASK = """
what is|who invented|tell me about|where can I find|how much does it cost to learn about|why
do people worry about|explain|is there anything new on|compare prices for|what should I know
about
"""


def pick(draw: random.Random, phrases: str) -> str:
    """Return one phrase of a list above."""
    return draw.choice(phrases.strip().replace("\n", " ").split("|"))


def sentence(draw: random.Random) -> str:
    """Return one text: a statement, two of them joined, a question, or a bare phrase."""
    statement = f"{pick(draw, WHO)} {pick(draw, DID)}"
    kind = draw.randrange(8)
    if kind < 3:
        text = f"{statement} {pick(draw, WHEN)}."
    elif kind == 3:
        text = f"{pick(draw, WHEN)}, {statement}, and {pick(draw, WHO)} {pick(draw, DID)}."
    elif kind == 4:
        text = f"{statement}."
    elif kind == 5:
        text = f"{pick(draw, ASK)} {pick(draw, TOPIC)}?"
    elif kind == 6:
        return pick(draw, TOPIC)
    else:
        other = f"{pick(draw, WHO)} {pick(draw, DID)} {pick(draw, WHEN)}"
        number = draw.randrange(2, 900)
        text = f'"{statement}", said {pick(draw, WHO)}; {number} people heard that {other}.'
    return text[0].upper() + text[1:]


def main() -> None:
    """Print the texts, one per line, without repeats."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    draw = random.Random(SEED)
    texts: dict[str, None] = {}
    while len(texts) < COUNT:
        texts[sentence(draw)] = None
    print("\n".join(texts))


if __name__ == "__main__":
    main()
