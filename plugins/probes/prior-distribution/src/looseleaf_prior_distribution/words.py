"""The words that tasks are made of."""

from __future__ import annotations

import string

_NUMBERS = """
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty
"""
_SHORT = """
    act add age ago aid aim air all and any are arm art ask bad bag bar bat bay bed bet bid big bit box boy bug
    bus but buy can cap car cat cow cry cup cut dad day did die dig dog dot dry due ear eat egg end era eye fan
    far fat few fig fit fly fog for fun gap gas get gun guy had has hat her hid him his hit hot how ice ill ink
    its jar job joy key kid lab law lay leg let lie lip lot low mad man map may men mix mom mud net new nor not
    now nut odd off oil old one our out own pad pan pay pen per pet pie pig pin pot put ran raw red rid row run
    sad sat saw say sea see set she sit six sky son sum sun tax tea ten the tie tin tip top toy try two use van
    war was way web wet who why win yes yet you zip zoo
"""
_LONG = """
    apple animal author autumn bottle banker bridge beauty castle camera circle cousin doctor desert dinner
    dragon engine editor effort empire farmer flower forest friend garden guitar ground ginger hammer hunter
    hockey harbour island insect injury impact jacket jungle junior journey kitchen kitten knight kidney letter
    lawyer ladder legend market mirror monkey museum nature number needle novel orange office object option
    planet pencil palace parent quarter queen quality question river rabbit record reward summer silver school
    spider table tunnel ticket temple uncle union unit umbrella valley violin victim village winter window
    worker weapon xenon xerox xylophone yellow yogurt youth yard zebra zipper zone zero
"""

NUMBERS = tuple(_NUMBERS.split())
"""One to twenty."""
WORDS = tuple(_SHORT.split())
"""Words of three letters, from very common to rare."""
FIRST = {letter: [word for word in _LONG.split() if word[0] == letter] for letter in string.ascii_lowercase}
"""Letter -> longer words that begin with it."""

__all__ = ["FIRST", "NUMBERS", "WORDS"]
