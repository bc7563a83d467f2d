r"""What captions look like that say nothing, as SQL over `{caption}`.

\p{L} is a letter of any script; words are what white space of any kind separates.
"""

from __future__ import annotations

_ENDINGS = "jpe?g|jfif|png|gif|webp|bmp|tiff?|svg|heic|heif|avif|ico|psd|raw|cr2|nef|mp4|mov|avi|pdf"
# What cameras, phones and programs call an image that nobody has named.
_DEVICES = (
    "img|imag|image|images|_?dsc|dscn|dscf|dcim|sdc|sam|pic|pict|picture|photo|foto|fotos|imgp|cimg|hpim|mvi|vid|gopr|"
    "wp|pxl|kif|scan|screenshot|screen shot|slide|figure|fig|file|untitled|unnamed|noname|no name|thumbnail|thumb|"
    "default|dji|whatsapp image|bild|imagen|immagine|obr"
)
_NUMBERS = "[-_ .():x#0-9]*"
_NAMES = (
    rf"\S+[.](?:{_ENDINGS})",  # one word that ends as image files do
    # Numbers, dates and times follow: "IMG-20190504-WA0012", "Screenshot 2021-03-04 at 10.11.12".
    rf"(?:{_DEVICES})(?:[-_ .]?(?:img|image|copy))?{_NUMBERS}(?:(?:at|wa|copy){_NUMBERS})?(?:[.](?:{_ENDINGS}))?",
    r"p[0-9]{5,}",
    r"[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}|[0-9a-f]{16,}",  # the digests and ids of content systems
    r"\P{L}*",  # not one letter: empty, numbers, dates, stars
)
IS_NAME = rf"regexp_full_match({{caption}}, '(?is)\s*(?:{'|'.join(_NAMES)})\s*')"
# Without a regular expression, which would take five times as long.
_BLANK_CODES = (*range(9, 14), *range(28, 32), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F)
_BLANKS = "".join(map(chr, (*_BLANK_CODES, 0x205F, 0x3000)))
_ONE_BLANK = f"translate({{caption}}, '{_BLANKS}', '{' ' * len(_BLANKS)}')"
NUM_WORDS = f"len(list_filter(string_split({_ONE_BLANK}, ' '), lambda word: word <> ''))"
