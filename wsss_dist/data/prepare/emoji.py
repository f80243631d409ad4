"""Which emoji make which class, as Unicode code points in the way the package names its files."""

CLASSES = {
    "bird": (
        "1f414 1f413 1f423 1f424 1f425 1f426 1f427 1f54a 1f985 1f986 1f9a2 1f989 1f9a4 1f9a9 1f99a 1f99c 1f983 1fabf"
    ),
    "hoofed": (
        "1f402 1f403 1f404 1f416 1f40e 1f40f 1f411 1f410 1f42a 1f42b 1f999 1f992 1f98c 1f417 1f993 1f9ac 1face 1facf"
    ),
    "carnivore": "1f415 1f429 1f408 1f405 1f406 1f43a 1f98a 1f99d 1f981 1f43b 1f9a1 1f9a6 1f9ae",
    "rodent": "1f401 1f400 1f439 1f430 1f407 1f43f 1f9ab 1f42d",
    "sealife": "1f433 1f40b 1f42c 1f9ad 1f41f 1f420 1f421 1f988 1f419 1f41a 1fab8 1fabc 1f980 1f99e 1f990 1f991",
    "flower": "1f490 1f338 1f4ae 1fab7 1f3f5 1f339 1f940 1f33a 1f33b 1f33c 1f337 1fabb",
    "fruit": (
        "1f347 1f348 1f349 1f34a 1f34b 1f34c 1f34d 1f96d 1f34e 1f34f 1f350 1f351 1f352 1f353 1fad0 1f95d 1fad2 1f965"
    ),
    "vegetable": "1f345 1f951 1f346 1f954 1f955 1f33d 1f336 1fad1 1f952 1f96c 1f966 1f9c4 1f9c5 1f344 1fadb",
    "vehicle": (
        "1f682 1f68c 1f68d 1f68e 1f690 1f691 1f692 1f693 1f695 1f697 1f699 1f69a 1f69b 1f69c 1f3ce 1f6f5 1f6fa 1f6fb"
    ),
    "instrument": "1f3b7 1fa97 1f3b8 1f3b9 1f3ba 1f3bb 1fa95 1f941 1fa98 1fa87 1fa88",
    "tool": "1f528 1fa93 26cf 2692 1f6e0 1fa9a 1f527 1fa9b 1f529 1f5dc 1fa9c 1fa9d",
}
DISTRACTORS = (
    "1f3c0 26bd 1f3be 1f3d0 1f4f7 1f4a1 1f511 1fa91 1f6cb 1f4e6 1f3e0 1f354 1f355 1f369 1f382 2615 1f451 1f393 1f381 "
    "1f388 1f3a9 1f45f 1f484 1f4da 1f50b 1f56f 1f5fd 1f680 1f6aa 1f9f8 1f95a 1f950 1f956 1f9c0 1f366 1f36a"
)
