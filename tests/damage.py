"""Damage to an open file, where chance has it."""

import os
import random


def flip(file, place, chance):
    file.seek(place)
    (byte,) = file.read(1)
    file.seek(place)
    file.write(bytes([byte ^ 1 << chance.randrange(8)]))


def flip_bits(seed):
    chance = random.Random(seed)

    def harm(file):
        size = os.fstat(file.fileno()).st_size
        for _ in range(chance.choice((1, 1, 8, 64))):
            flip(file, chance.randrange(size), chance)

    return harm


def cut_short(seed):
    chance = random.Random(seed)
    return lambda file: file.truncate(chance.randrange(1, os.fstat(file.fileno()).st_size))
