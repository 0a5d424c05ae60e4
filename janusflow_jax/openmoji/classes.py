"""The classes of the OpenMoji data set: one drawing each, with a short name.

Chosen by eye from OpenMoji 17: things, animals and food. No people, hands, flags of countries,
letters, signs of the zodiac or clock faces; no two drawings that differ only in detail; no name
that contains a color. The build refuses a drawing whose color cannot be changed.
"""

from __future__ import annotations

import re

_TABLE = """
1F3C8 football       1F3A8 palette        1F697 car            1F951 avocado
1F37C baby bottle    1F424 chick          1F392 backpack       1F956 baguette
1F388 balloon        1F34C banana         1F9FA basket         1F3C0 basketball
1F43B bear           1F9AB beaver         1F37A beer mug       1F514 bell
1FAD1 bell pepper    1F9C3 juice box      1F426 bird           1F382 birthday cake
1F421 blowfish       1F4D8 book           1F516 bookmark       1F94A boxing glove
1F9E0 brain          1F35E bread          1F9F1 brick          1F4BC briefcase
1F966 broccoli       1F494 broken heart   1FAA3 bucket         1F3AF target
1F32F burrito        1F98B butterfly      1F335 cactus         1F4C5 calendar
1F42A camel          1F36C candy          1F955 carrot         1F408 cat
1FA91 chair          2714  check mark     1F9C0 cheese         1F352 cherry
1F43F chipmunk       1F36B chocolate bar  1F9E5 coat           1F378 cocktail
1FA99 coin           1F4A5 explosion      1F9ED compass        1F36A cookie
1FAB8 coral          1F6CB couch          1F404 cow            1F980 crab
1F58D crayon         1F4B3 credit card    1F319 moon           1F40A crocodile
1F950 croissant      274C  cross mark     1F451 crown          1F52E crystal ball
1F333 tree           1F98C deer           1F537 diamond        1F415 dog
1F6AA door           1F369 doughnut       1F409 dragon         1F457 dress
1F4A7 drop           1F941 drum           1F986 duck           1F985 eagle
1F33D corn           1F346 eggplant       1FAB9 nest           1F332 fir tree
1F341 maple leaf     1F525 fire           1F692 fire truck     1F41F fish
1F9A9 flamingo       1F340 clover         1F98A fox            1F438 frog
1F48E gem            1F992 giraffe        1F310 globe          1F410 goat
1F47E alien monster  1F354 hamburger      1F439 hamster        1FA89 harp
2764  heart          1F994 hedgehog       1F460 high heel      26A1  lightning bolt
1F97E boot           1F36F honey pot      1F40E horse          1F32D hot dog
1F336 chili          1F9CA ice cube       26F8  ice skate      1F383 pumpkin
1FABC jellyfish      1F998 kangaroo       1F511 key            1FA81 kite
1F3F7 label          1F41E ladybug        1F34B lemon          1F4A1 light bulb
1F981 lion           1F99E lobster        1F512 padlock        1F36D lollipop
1FAB7 lotus          1F9F3 suitcase       1F4B0 money bag      1F412 monkey
1F3CD motorcycle     1F444 mouth          1F344 mushroom       1F419 octopus
1F9C5 onion          1F4E6 box            1F334 palm tree      1FA82 parachute
1FADB pea pod        1F99A peacock        1F350 pear           270F  pencil
1F967 pie            1F416 pig            1F34D pineapple      1F355 pizza
1F4EF horn           1F4EE mailbox        1F968 pretzel        1F45B purse
1F3CE race car       1F34E apple          1F3EE lantern        1F397 ribbon
1F380 bow            26D1  helmet         1F6DF life ring      1FA90 planet
1F680 rocket         1F6FC roller skate   1F413 rooster        1F339 rose
1F3C5 medal          26F5  sailboat       1F995 dinosaur       1F9E3 scarf
1F4DC scroll         1F6E1 shield         1F6A2 ship           1F6CD shopping bag
1F990 shrimp         1F6E9 airplane       1F40C snail          1F40D snake
1F9E6 sock           1F366 ice cream      2B50  star           1F35C bowl
1F353 strawberry     2600  sun            1F33B sunflower      1F455 shirt
1F32E taco           1F9F8 teddy bear     260E  telephone      1F3BE tennis ball
26FA  tent           1FA74 sandal         1F3AB ticket         1F405 tiger
1F345 tomato         1FA8E treasure chest 1F6A9 flag           1F531 trident
1F68E bus            1FA8A trombone       1F3C6 trophy         1F983 turkey
1F422 turtle         2602  umbrella       1F3BB violin         26A0  warning sign
1F30A wave           1F349 watermelon     1F40B whale          1F377 wine glass
1FAB5 log            1F381 gift           1F9F6 yarn           1F45C handbag
1FAAD fan            1F570 clock          1F534 circle         1F7E5 square
1F418 elephant       1F98F rhino          1F428 koala          1F43A wolf
1F98D gorilla        1F987 bat            1F401 mouse          1F42C dolphin
1F988 shark          1F9AD seal           2601  cloud          1F4A3 bomb
1FAD6 teapot         1F47D alien          1F6C1 bathtub        2699  gear
1F50C plug           1F527 wrench         1F4C1 folder         1F4E2 megaphone
265F  pawn           2660  spade          2663  club           26F0  mountain
1F6DE wheel
"""

_NEW_TABLE = """
1F9C1 cupcake         1F347 grapes          1F351 peach           1F965 coconut
1F330 chestnut        1F95A egg             1F969 steak           1F375 teacup
1F37E bottle          1F944 spoon           1F3FA vase            1F30B volcano
1F3F0 castle          1F682 train           1F69C tractor         1F6F5 scooter
1F681 helicopter      1F9E2 cap             1F48D ring            1F456 jeans
1F454 necktie         1F3B8 guitar          1F3BA trumpet         1F4F7 camera
1F4FA television      2702  scissors        1F528 hammer          1F9F2 magnet
1F577 spider          1F982 scorpion        1F99C parrot          1F989 owl
1F427 penguin         1F430 rabbit          1F411 sheep           1F999 llama
1F337 tulip           1F3AA circus tent     1F9E9 puzzle piece    1F6F7 sled
"""


def _parse(table: str) -> dict[str, str]:
    """Code point -> name. A word of four or five hexadecimal digits begins a new class."""
    cells = re.split(r"\b([0-9A-F]{4,5})\b", table)[1:]
    return {
        point: " ".join(name.split()) for point, name in zip(cells[::2], cells[1::2], strict=True)
    }


CLASSES = _parse(_TABLE)
"""Code point of the drawing (file name without .svg) -> name."""

NEW = _parse(_NEW_TABLE)
"""Drawings that the quick start never sees, for fine-tuning (configs/finetune.py:emoji)."""
