"""Keys of run files of older versions: the message about such an unknown key names the key that replaces it."""

_IMPORTED = "`detections`, the name of an `import_detections` step with these `results`"

# Stage -> old key, dotted if it is nested -> its replacement, after "it is now". docs/migration.md lists them too.
RENAMED: dict[str, dict[str, str]] = {
    "detect": {"checkpoint": "`detector`"},
    "proposals": {"clues": "`peaks`"},
    "pgt": {"results": _IMPORTED},
    "pseudo_masks": {"results": _IMPORTED},
    "evaluate": {"results": _IMPORTED},
}
