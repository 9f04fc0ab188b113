"""Name what stands alone on Tiny-ImageNet and flowers, which the captioned photos hardly show.

Flickr8k and Pascal Sentences are of people, dogs and streets: a captioner taught by them alone
takes a cup of coffee for a climber. Classes whose pictures show people or dogs are left out, since
those photos say them better.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pictures import Captioned, as_planes, captioned, captioned_rows, tiny_imagenet, views

SIDE = 64  # pixels
QUALITIES = (40, 55, 70, 85)  # of WebP: a thousand bytes a picture, as Tiny-ImageNet has them
FINEST = 64  # cells a side that a hybrid takes from the thing, at most; a half at least

PHRASES = {
    "Egyptian cat": ["a cat", "a grey cat is looking at the camera"],
    "lemon": ["yellow lemons", "a yellow lemon"],
    "bullfrog": ["a green frog", "a frog is sitting in the water"],
    "cliff": ["a rocky cliff", "a cliff by the sea"],
    "espresso": ["a cup of coffee", "a cup of coffee on a table"],
    "dining table": ["a table and chairs in a room", "a dining table"],
    "monarch": ["an orange butterfly", "an orange butterfly on a flower"],
    "brown bear": ["a brown bear", "a bear is walking in the grass"],
    "school bus": ["a yellow school bus", "a yellow bus is parked on the street"],
    "pizza": ["a pizza", "a pizza on a plate"],
    "guinea pig": ["a guinea pig", "a small brown and white animal"],
    "goldfish": ["an orange fish", "an orange fish in the water"],
    "potpie": ["a plate of food", "food on a plate"],
    "hourglass": ["an hourglass"],
    "seashore": ["a beach and the ocean", "waves on the beach"],
    "computer keyboard": ["a computer keyboard", "a keyboard on a desk"],
    "Arabian camel": ["a camel in the desert", "a camel is standing in the sand"],
    "ice cream": ["a bowl of ice cream", "ice cream"],
    "nail": ["a nail"],
    "snail": ["a snail", "a snail on a leaf"],
    "coral reef": ["a coral reef under water", "fish are swimming under water"],
    "albatross": ["a white bird", "a white bird is flying over the water"],
    "spider web": ["a spider web"],
    "pretzel": ["a pretzel", "pretzels on a plate"],
    "king penguin": ["a penguin", "penguins are standing on the ice"],
    "sulphur butterfly": ["a yellow butterfly", "a yellow butterfly on a flower"],
    "tarantula": ["a big spider", "a black spider"],
    "lesser panda": ["a red panda", "a red panda in a tree"],
    "pop bottle": ["a bottle", "a bottle of soda"],
    "banana": ["yellow bananas", "a bunch of bananas"],
    "cockroach": ["a brown insect"],
    "projectile": ["a rocket", "a white rocket"],
    "beer bottle": ["a bottle of beer", "beer bottles"],
    "mantis": ["a green insect", "a green insect on a leaf"],
    "freight car": ["a train on the tracks", "a freight train"],
    "guacamole": ["a bowl of green food", "a plate of food"],
    "remote control": ["a remote control"],
    "European fire salamander": ["a black and yellow lizard"],
    "lakeside": ["a lake and trees", "a lake with mountains in the background"],
    "chimpanzee": ["a black monkey", "a monkey is sitting in the grass"],
    "alp": ["a snowy mountain", "mountains covered in snow"],
    "lampshade": ["a lamp", "a lamp in a room"],
    "abacus": ["an abacus"],
    "moving van": ["a white truck", "a truck is parked on the street"],
    "barrel": ["a wooden barrel", "wooden barrels"],
    "tabby": ["a cat", "a striped cat is lying down"],
    "goose": ["a goose", "geese in the grass"],
    "koala": ["a koala in a tree", "a grey koala"],
    "bullet train": ["a train at a station", "a white train"],
    "CD player": ["a stereo", "a music player"],
    "teapot": ["a teapot", "a teapot on a table"],
    "birdhouse": ["a birdhouse", "a small wooden birdhouse"],
    "gazelle": ["a deer in the grass", "a small deer"],
    "tractor": ["a tractor in a field", "a red tractor"],
    "ladybug": ["a red ladybug", "a ladybug on a leaf"],
    "triumphal arch": ["a stone arch", "a large stone building"],
    "cannon": ["a cannon"],
    "candle": ["a candle", "burning candles"],
    "desk": ["a desk with a computer", "a desk in a room"],
    "frying pan": ["a frying pan", "food in a pan"],
    "bee": ["a bee on a flower", "a bee"],
    "dam": ["a dam", "water flowing over a dam"],
    "spiny lobster": ["a lobster"],
    "iPod": ["a music player"],
    "beacon": ["a lighthouse", "a white lighthouse"],
    "jellyfish": ["a jellyfish in the water", "a jellyfish"],
    "wok": ["food in a pan", "a pan of food"],
    "slug": ["a slug"],
    "hog": ["a pig", "a pink pig"],
    "cougar": ["a wild cat", "a brown wild cat"],
    "crane": ["a grey bird", "a tall bird is standing in the grass"],
    "dragonfly": ["a dragonfly", "a dragonfly on a plant"],
    "cash machine": ["a cash machine"],
    "mushroom": ["a mushroom", "a mushroom in the grass"],
    "water tower": ["a water tower", "a tall water tower"],
    "chest": ["a wooden chest"],
    "fly": ["a fly", "a fly on a leaf"],
    "limousine": ["a long white car", "a black car"],
    "black stork": ["a black bird", "a black bird with a red beak"],
    "dugong": ["a large animal under water"],
    "sports car": ["a red car", "a sports car"],
    "water jug": ["a jug", "a water jug"],
    "suspension bridge": ["a large bridge", "a bridge over the water"],
    "ox": ["a cow", "a brown cow is standing in the grass"],
    "scorpion": ["a scorpion"],
    "wooden spoon": ["a wooden spoon", "wooden spoons"],
    "picket fence": ["a white fence", "a white fence in front of a house"],
    "sewing machine": ["a sewing machine"],
    "steel arch bridge": ["a bridge over a river", "a large bridge"],
    "Persian cat": ["a white cat", "a cat is lying down"],
    "refrigerator": ["a refrigerator", "a white refrigerator in a kitchen"],
    "barn": ["a red barn", "a barn in a field"],
    "stopwatch": ["a stopwatch", "a clock"],
    "lawn mower": ["a lawn mower on the grass"],
    "thatch": ["a house with a straw roof", "a hut"],
    "fountain": ["a fountain", "a fountain in front of a building"],
    "black widow": ["a black spider"],
    "plate": ["a plate of food", "food on a white plate"],
    "teddy": ["a teddy bear", "a brown teddy bear"],
    "confectionery": ["candy in a store", "sweets on shelves"],
    "beach wagon": ["a car", "a car is parked on the street"],
    "scoreboard": ["a scoreboard in a stadium"],
    "orange": ["oranges", "an orange"],
    "flagpole": ["a flag on a pole", "a flag is flying"],
    "American lobster": ["a red lobster", "a lobster on a plate"],
    "trolleybus": ["a bus on the street", "a bus in the city"],
    "convertible": ["a red car", "a car with an open roof"],
    "bighorn": ["a sheep on a mountain", "a ram is standing on rocks"],
    "orangutan": ["an orange monkey", "a monkey in a tree"],
    "American alligator": ["an alligator", "an alligator in the water"],
    "centipede": ["an insect with many legs"],
    "brain coral": ["coral under water"],
    "sea slug": ["a colorful animal under water"],
    "cliff dwelling": ["old stone buildings in a cliff", "stone ruins"],
    "mashed potato": ["a plate of food", "potatoes and meat on a plate"],
    "viaduct": ["a stone bridge", "a bridge with many arches"],
    "pomegranate": ["a red fruit", "red fruit"],
    "bison": ["a bison", "a brown bison is standing in a field"],
    "boa constrictor": ["a snake", "a brown snake"],
    "bathtub": ["a white bathtub", "a bathtub in a bathroom"],
    "grasshopper": ["a green grasshopper", "a grasshopper on a leaf"],
    "walking stick": ["a thin insect on a branch"],
    "tailed frog": ["a brown frog"],
    "lion": ["a lion", "a lion is lying in the grass"],
    "altar": ["an altar in a church", "the inside of a church"],
    "obelisk": ["a tall stone monument", "a monument"],
    "bell pepper": ["red and green peppers", "a green pepper"],
    "bucket": ["a bucket"],
    "magnetic compass": ["a compass"],
    "meat loaf": ["meat on a plate", "a plate of food"],
    "gondola": ["a boat on a canal", "a boat in the water"],
    "acorn": ["acorns", "an acorn on a branch"],
    "lifeboat": ["a red boat", "a boat in the water"],
    "cauliflower": ["a white cauliflower", "white vegetables"],
    "African elephant": ["an elephant", "an elephant is walking in the grass"],
}


FLOWERS = {
    "daisy": ["a white flower", "a white daisy"],
    "dandelion": ["a yellow flower in the grass", "a dandelion"],
    "roses": ["a rose", "roses"],
    "sunflowers": ["a yellow sunflower", "sunflowers in a field"],
    "tulips": ["tulips", "tulips in a garden"],
}


def things(data: Path, split: str = "train") -> Captioned:
    """Read the pictures of Tiny-ImageNet and flower_photos whose classes have sentences.

    64 x 64 pixels each.
    """
    folder = data / "tiny_imagenet_64"
    names = [row["name"] for row in json.loads((folder / "classes.json").read_text())]
    labelled = tiny_imagenet(folder, split)
    rows = [row for row, label in enumerate(labelled.labels.tolist()) if names[label] in PHRASES]
    captions = [PHRASES[names[label]] for label in labelled.labels[rows].tolist()]
    folder = data / "flowers_128"
    flowers = captioned(folder, {split}, SIDE)
    captions += [FLOWERS[row["label"]] for row in captioned_rows(folder, {split})]
    return Captioned(torch.cat([labelled.pixels[rows], flowers.pixels]), captions)


def coded(pixels: Tensor) -> Tensor:
    """Store photos [N, 3, H, W] uint8 as small and as coarse as Tiny-ImageNet is: 64 x 64, WebP."""
    pictures = []
    for row, photo in enumerate(pixels):
        small = F.interpolate(
            photo[None].float(), (SIDE, SIDE), mode="bilinear", antialias=True
        ).round()
        file = io.BytesIO()
        picture = Image.fromarray(small[0].byte().permute(1, 2, 0).numpy())
        picture.save(file, "WEBP", quality=QUALITIES[row % len(QUALITIES)])
        pictures.append(np.asarray(Image.open(file).convert("RGB")))
    return as_planes(pictures)


def viewed(
    photos: Tensor,
    coarse: Tensor,
    alone: Tensor,
    size: int,
    options: dict[str, Any],
    generator: torch.Generator,
) -> Tensor:
    """Cut views of photos and, behind them, of things; what is coarse must not give things away.

    The first `blurred` of the photos are seen as `coded`. The first `detailed` of the things get
    their fine structure from photos, which hides what their codec left: hybrid images (Oliva et al.
    2006). `generator` lives where the pictures do.
    """
    few = round(options["blurred"] * len(photos)) if len(alone) else 0
    crop = options["smallest_crop"]
    pixels = views(photos[few:], size, crop, generator)
    if len(alone):
        single = views(alone, size, crop, generator)
        kept = round(options["detailed"] * len(alone))
        given = torch.arange(kept, device=pixels.device) % len(pixels)
        hybrid = detailed(single[:kept], pixels[given], generator)
        pixels = torch.cat(
            [views(coarse[:few], size, crop, generator), pixels, hybrid, single[kept:]]
        )
    return pixels.contiguous(memory_format=torch.channels_last)


def detailed(single: Tensor, photos: Tensor, generator: torch.Generator) -> Tensor:
    """Give views of things [B, 3, H, W] sharp edges, and the fine structure of as many photos.

    The photos stand on their heads, so that nobody is to be seen in what they give.
    """
    side = int(torch.randint(FINEST * 5 // 8, FINEST + 1, ()))
    shape, device = (2, len(single), 1, 1, 1), single.device
    drawn = torch.rand(shape, generator=generator, device=device)
    sharpened, strength = (1.5 * drawn - 0.5).clamp(min=0)  # a third has nothing of either
    soft, photos = softened(single, side), photos.flip(2)
    edges, fine = soft - softened(soft, side // 2), photos - softened(photos, side)
    return (soft + sharpened * edges + strength * fine).clamp(-1, 1)


def softened(pixels: Tensor, side: int) -> Tensor:
    """Take the structure finer than `side` cells a picture out of [B, 3, H, W]."""
    small = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
    return F.interpolate(small, pixels.shape[2:], mode="bicubic")
