"""Keys of run files that older versions had: an unknown key listed below is answered with the key that replaces it."""

_IMPORTED = "`detections`, the name of an `import_detections` step with these `results`"

# Stage -> old key, dotted where it is nested -> what replaces it, after "it is now". docs/migration.md has them too.
RENAMED: dict[str, dict[str, str]] = {
    "detect": {"checkpoint": "`detector`"},
    "proposals": {"clues": "`peaks`"},
    "pgt": {"results": _IMPORTED},
    "pseudo_masks": {"results": _IMPORTED},
    "evaluate": {"results": _IMPORTED},
}
