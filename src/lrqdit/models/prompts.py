"""Prompts of our own, for calibration and for evaluation."""

CALIBRATION_PROMPTS = (
    "a red fox sitting in fresh snow", "a bowl of ramen with a soft egg", "a lighthouse on a cliff at sunset",
    "portrait of an old sailor with a pipe", "a blue bicycle leaning against a brick wall",
    "an astronaut riding a horse, oil painting", "macro photo of a dragonfly on a leaf",
    "a city street at night in the rain, neon lights", "two children building a sandcastle on the beach",
    "a glass of orange juice beside a sliced orange", "an old wooden door with iron fittings",
    "a herd of elephants crossing a river at dawn", "minimalist logo of a mountain, flat colours",
    "a surgeon in a green gown, documentary photograph", "isometric drawing of a small island with a windmill",
    "a black cat asleep on a stack of books", "a steam train on a stone viaduct in autumn",
    "close-up of a human eye, hazel iris", "a knight in golden armour, fantasy concept art",
    "a vase of tulips, still life in the Dutch style", "satellite view of a river delta",
    "a crowded fish market in the morning", "a white ceramic teapot on a plain grey background",
    "a basketball player in mid-air, stadium lights", "ink drawing of a crane among reeds",
    "a spiral staircase seen from above", "a birthday cake with seven candles", "a desert road under the milky way",
    "portrait of an elderly woman laughing, studio light", "a chameleon on a branch, bright colours",
    "a poster that says OPEN in red letters", "abandoned factory overgrown with ivy",
)  # fmt: skip
EVALUATION_PROMPTS = (
    "a green parrot on a branch", "a cup of coffee on a wooden table", "a sailing boat in a storm",
    "portrait of a girl with a straw hat", "a yellow taxi in front of a theatre",
    "a medieval castle on a hill, watercolour", "a slice of cherry pie with cream", "a robot watering sunflowers",
)  # fmt: skip
