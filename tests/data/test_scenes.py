"""Scenes of handwritten digits: drawn the same every time, boxes and answers right, unreadable at first look."""

import pickle
import re
import zlib

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image, ImageDraw
from sklearn.neighbors import KNeighborsClassifier

from conftest import compose_config
from vpt.checkpoint.load import build_model
from vpt.data.build import build_sources
from vpt.data.images import MediaStore
from vpt.data.records import ImageRef, Record
from vpt.data.sources.scene_cells import CELLS, COLUMNS, ROWS
from vpt.data.sources.scene_grid import CANVAS
from vpt.data.sources.scene_layout import PLURALS, QUESTIONS, SceneQuestion
from vpt.data.sources.scene_rendering import Frame, Glyph, Scene, render_scene, texture_bank
from vpt.data.sources.scenes import Scenes, load_digits
from vpt.errors import DataError
from vpt.perception.batch import VISION_TOWER
from vpt.perception.regions import Region

EVERY = "{read:1,compare:1,count:1,there:1,colour:1,gaps:1,closed:1,place:1}"
READ = "{read:1,compare:0,count:0,there:0,colour:0}"


HARD = (
    "brightness=[105,150]",
    "digit=[0.024,0.028]",
    "frame=0.09",
    "line=0.15",
    "grid=0",
    "dark=0.5",
    "texture=20",
    "cluster=0.15",
)


def scenes(
    *overrides: str, split: str = "train", questions: str = EVERY, hard: bool = True
) -> tuple[Scenes, MediaStore]:
    """A source of scenes and its images; those of conf/data/scenes.yaml where they are not `hard`."""
    config = compose_config("data=scenes", "encoder=[]", "data.actions={none:0,region:1}", "~data.train.lessons")
    sources = getattr(config.data, split)
    given = OverridesParser.create().parse_overrides([f"questions={questions}", *(HARD if hard else ()), *overrides])
    options = OmegaConf.merge(sources["scenes"].options, *({each.key_or_group: each.value()} for each in given))
    sources["scenes"].options = OmegaConf.to_container(options)
    (source,), (folder,) = build_sources(sources, config, split=split)
    return source, folder


def test_the_same_seed_and_number_make_the_same_scene_in_any_order():
    one, images = scenes()
    other, images_too = scenes()
    for index in (7, 3, 7):
        assert other.question(index) == one.question(index)
        assert other[index].messages == one[index].messages
    order = [one[index].images[VISION_TOWER][0] for index in range(6)]
    first = [np.asarray(images.original(image, where="")) for image in order]
    for image, pixels in reversed(list(zip(order, first))):
        assert np.array_equal(np.asarray(images_too.original(image, where="")), pixels)
    unpickled = pickle.loads(pickle.dumps(images))  # as a data worker may get it
    assert np.array_equal(np.asarray(unpickled.original(order[2], where="")), first[2])


def test_scenes_are_those_of_earlier_versions():
    """Runs that are compared with earlier ones answer the same test."""
    source, _ = scenes(questions="{read:1,compare:1,count:1,there:1,colour:1}", split="test")
    drawn = [
        (posed.question, posed.answer, posed.box, described(posed.scene)) for posed in map(source.question, range(40))
    ]
    assert zlib.crc32(repr(drawn).encode()) == 1456915510


def described(scene: Scene) -> list:
    """What is drawn where, in plain values."""
    glyphs = [value for glyph in scene.glyphs for value in vars(glyph).values()]
    frames = [value for frame in scene.frames for value in (frame.colour, frame.box, frame.width)]
    return [scene.side, *vars(scene.ground).values(), *glyphs, *frames]


def test_the_scenes_seed_changes_them_and_the_runs_seed_does_not():
    plain, _ = scenes(hard=False)
    config = compose_config("data=scenes", "encoder=[]", "seed=5", f"data.train.scenes.options.questions={EVERY}")
    (source, _), _ = build_sources(config.data.train, config, split="train")
    other, _ = scenes("seed=5", hard=False)
    assert source.question(0).scene == plain.question(0).scene != other.question(0).scene
    assert (
        len({str(source.root) for source in (plain, other, scenes(questions=READ)[0])}) == 3
    )  # or caches would mix them up


def test_no_digit_is_in_both_splits():
    (train, train_values), (test, test_values) = load_digits("train"), load_digits("test")
    assert len(train) + len(test) == 1797 and len(train_values) == len(train) and len(test_values) == len(test)
    assert not {digit.tobytes() for digit in train} & {digit.tobytes() for digit in test}
    assert set(test_values) == set(train_values) == set(range(10))
    for split in ("train", "test"):
        source, _ = scenes(split=split)
        assert np.array_equal(source.images, load_digits(split)[0])


@pytest.mark.parametrize("split", ["train", "test"])
def test_boxes_hold_the_digits_and_nothing_else_does(split):
    """Without a digit the scene differs inside its box alone, and what differs is that digit."""
    source, images = scenes(split=split)
    tiles = texture_bank(
        source.seed, ("train", "test").index(split), contrast=source.texture, brightness=source.brightness
    )
    for index in range(16):
        posed = source.question(index)
        scene = posed.scene
        whole = np.asarray(images.original(source[index].images[VISION_TOWER][0], where="")).astype(int)
        assert whole.shape == (scene.side, scene.side, 3) and 336 <= scene.side <= 672
        for glyph in scene.glyphs:
            without = Scene(scene.side, scene.ground, tuple(g for g in scene.glyphs if g != glyph), scene.frames)
            change = np.abs(whole - np.asarray(render_scene(without, source.images, tiles)).astype(int)).sum(-1)
            x0, y0, x1, y1 = glyph.box
            inside = change[y0:y1, x0:x1]
            assert inside.any() and inside.sum() == change.sum()
            stored = Image.fromarray(source.images[glyph.image]).resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC)
            assert np.corrcoef(inside.ravel(), np.asarray(stored).ravel())[0, 1] > 0.9


def inside(inner, outer) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


def framed(scene: Scene, colour: str) -> Glyph:
    """The digit in the frame of a colour."""
    (frame,) = [frame for frame in scene.frames if frame.colour == colour]
    (glyph,) = [glyph for glyph in scene.glyphs if inside(glyph.box, frame.box)]
    return glyph


def gaps_of(frame: Frame) -> int:
    """Interruptions along the four sides of a frame, drawn by itself."""
    (x0, y0, x1, y1), canvas = frame.box, Image.new("L", (frame.box[2] + 1, frame.box[3] + 1))
    pen = ImageDraw.Draw(canvas)
    for left, top, right, bottom in frame.strokes:
        pen.rectangle((left, top, right - 1, bottom - 1), fill=1)
    drawn, edge = np.asarray(canvas), round(frame.width / 2)
    near, far = edge + frame.width // 2, edge + (frame.width + 1) // 2  # the middle of a line
    span = slice(x0 + near, x1 - near), slice(y0 + near, y1 - near)
    sides = (drawn[y0 + near, span[0]], drawn[y1 - far, span[0]], drawn[span[1], x0 + near], drawn[span[1], x1 - far])
    return sum(int((np.diff(side.astype(int)) == -1).sum()) for side in sides)


def answer_of(posed: SceneQuestion) -> tuple[str, tuple[int, int, int, int]]:
    """Answer and evidence, from nothing but the question's words and what is on the canvas."""
    scene, question = posed.scene, posed.question
    if match := re.fullmatch(r"Which digit is in the (\w+) frame\?", question):
        glyph = framed(scene, match[1])
        return str(glyph.value), glyph.box
    if match := re.fullmatch(r"Is there a (\w+) frame\?", question):
        there = any(frame.colour == match[1] for frame in scene.frames)
        return "yes" if there else "no", (0, 0, scene.side, scene.side)
    if match := re.fullmatch(r"What colour is the (leftmost|rightmost|topmost|lowest) frame\?", question):
        axis, last = {"leftmost": (0, 0), "rightmost": (0, -1), "topmost": (1, 0), "lowest": (1, -1)}[match[1]]
        frames = sorted(scene.frames, key=lambda frame: frame.box[axis])
        edge = [frame.colour for frame in frames if frame.box[axis] == frames[last].box[axis]]
        assert len(edge) == 1
        return edge[0], (0, 0, scene.side, scene.side)
    if match := re.fullmatch(r"How many gaps has the (\w+) frame\?", question):
        (frame,) = [frame for frame in scene.frames if frame.colour == match[1]]
        return str(gaps_of(frame)), frame.box
    if match := re.fullmatch(r"Where is the (\w+) frame\?", question):
        x0, y0, x1, y1 = (glyph := framed(scene, match[1])).box
        column, row = (int((low + high) / 2 / scene.side * 8) for low, high in ((x0, x1), (y0, y1)))
        return COLUMNS[column] + ROWS[row], glyph.box
    if question == "Which frame is closed?":
        (frame,) = [frame for frame in scene.frames if gaps_of(frame) == 0]
        return frame.colour, frame.box
    if match := re.fullmatch(r"How many (\w+)\?", question):
        boxes = np.array([glyph.box for glyph in scene.glyphs])
        count = sum(glyph.value == PLURALS.index(match[1]) for glyph in scene.glyphs)
        return str(count), (*boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist())
    match = re.fullmatch(r"Is the digit (left of|right of|above|below) the (\w+) frame larger than (\d)\?", question)
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[match[1]]
    in_frame = framed(scene, match[2])

    def distance(glyph: Glyph) -> float:
        along, across = glyph.box[axis] - in_frame.box[axis], glyph.box[1 - axis] - in_frame.box[1 - axis]
        return sign * along if sign * along > abs(across) else np.inf

    glyph, *further = sorted(scene.glyphs, key=distance)
    assert not further or distance(further[0]) > 1.4 * distance(glyph)  # so that there is no doubt which is meant
    return "yes" if glyph.value > int(match[3]) else "no", glyph.box


@pytest.mark.parametrize("grid", [0, 4])
def test_answers_and_boxes_follow_from_the_scene(grid):
    """On a grid, too, where frames may be level."""
    for split in ("train", "test"):
        source, _ = scenes(f"grid={grid}", "crowd=2", "cluster=0.6", split=split)
        for index in range(400):
            posed = source.question(index)
            assert (posed.answer, posed.box) == answer_of(posed), posed
            assert all(source.values[glyph.image] == glyph.value for glyph in posed.scene.glyphs)
            assert all(inside(thing.box, (0, 0, posed.scene.side, posed.scene.side))
                       for thing in (*posed.scene.glyphs, *posed.scene.frames))  # fmt: skip
            record = source[index]
            assert (record.question, record.answer, record.box) == (posed.question, posed.answer, posed.box)


def test_no_answer_can_be_guessed():
    """Digits and counts come about equally often, and half of all yes-no questions, whatever they ask, say yes."""
    answers = {}
    source, _ = scenes()
    for index in range(6000):
        posed = source.question(index)
        answers.setdefault(posed.kind, []).append(posed.answer)
    assert set(answers) == set(QUESTIONS)
    for kind, expected in {
        "read": 10,
        "count": 4,
        "compare": 2,
        "there": 2,
        "colour": 6,
        "gaps": 5,
        "closed": 6,
    }.items():
        _, counts = np.unique(answers[kind], return_counts=True)
        share = len(answers[kind]) / expected
        assert len(counts) == expected and np.abs(counts - share).max() < 5 * share**0.5


@pytest.mark.parametrize("hard", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_first_look_shows_no_digit_and_the_crop_does(hard):
    """A nearest-neighbour classifier that is told where the digit stands reads it in the crop, not at first look."""
    looks, values = {}, {}
    pixels = ("data.image.min_pixels=4096", "data.image.max_pixels=4096") if hard else ()
    parts = build_model(compose_config("data=scenes", "encoder=[]", *pixels))
    for split, count in (("train", 400), ("test", 200)):
        source, folder = scenes(split=split, questions=READ, hard=hard)
        pairs = [evidence(parts, source[index], folder) for index in range(count)]
        looks[split] = np.array(pairs).transpose(1, 0, 2)
        values[split] = [source[index].answer for index in range(count)]
    first, crop = (
        KNeighborsClassifier(5).fit(looks["train"][i], values["train"]).score(looks["test"][i], values["test"])
        for i in (0, 1)
    )
    assert first < 0.3 and crop > 0.75


def test_the_first_look_shows_a_large_digit():
    """In `scenes/sizes` all of a large scene is twice as large: at a glance a nearest-neighbour classifier that is told where its
    digit stands reads it, and a region shows it as large as a small one."""
    config = compose_config("+experiment=scenes/sizes")
    glances: dict[str, tuple[list, list]] = {}
    for split in ("train", "test"):
        source, folder = (found[0] for found in build_sources(getattr(config.data, split), config, split=split))
        seen, values = glances[split] = ([], [])
        for index in range(500):
            posed, record = source.question(index), source[index]
            assert record.question_type == ("read large" if posed.large else "read")
            assert (posed.answer, posed.box) == answer_of(posed)
            side, cells = posed.scene.side, Region.from_box(posed.box, (posed.scene.side,) * 2, bins=8)
            assert (cells.x1 - cells.x0, cells.y1 - cells.y0) == ((1, 1) if posed.large else (0, 0))
            assert (posed.box[2] - posed.box[0]) / side == pytest.approx(0.104 if posed.large else 0.052, rel=0.1)
            if posed.large:
                canvas = folder.image(record.images[VISION_TOWER][0], where="").convert("L")
                glance = canvas.resize((config.data.image.detail,) * 2, Image.Resampling.BICUBIC)
                box = tuple(place * glance.width / side for place in posed.box)
                digit = np.asarray(glance.resize((8, 8), Image.Resampling.BICUBIC, box=box), dtype=float).ravel()
                seen.append((digit - digit.mean()) / digit.std())
                values.append(posed.answer)
    assert KNeighborsClassifier(5).fit(*glances["train"]).score(*glances["test"]) > 0.8


def evidence(parts, record: Record, folder: MediaStore) -> list[np.ndarray]:
    """The digit as the tower gets it in the whole image and in the crop, each as 64 values, light on dark."""
    features = []
    for reference in record.images[VISION_TOWER]:
        seen = folder.image(reference, where="")
        look = parts.processor.apply_transform(VISION_TOWER, seen)
        assert look.grid in ((1, 8, 8), (1, 4, 4)) if reference.crop is None else look.tokens <= 20
        left, top = (0, 0) if reference.crop is None else reference.crop[:2]
        width, height = look.grid[2] * 8, look.grid[1] * 8
        box = np.subtract(record.box, (left, top, left, top)) * np.tile((width, height), 2) / np.tile(seen.size, 2)
        tower = seen.convert("L").resize((width, height), Image.Resampling.BICUBIC)
        digit = np.asarray(tower.resize((8, 8), Image.Resampling.BICUBIC, box=tuple(box)), dtype=float)
        digit = (digit - digit.mean()) / (digit.std() + 1)
        features.append(digit.ravel() * np.sign(digit[2:6, 2:6].sum()))
    return features


def test_crops_come_from_the_canvas_itself():
    source, folder = scenes(questions=READ)
    record = source[3]
    image, crop = record.images[VISION_TOWER]
    side = source.question(3).scene.side
    region = Region.find(record.messages[2].content)[0][1]
    assert crop == ImageRef(image.path, region.to_box((side, side), bins=8))
    assert inside(record.box, crop.crop)
    assert np.array_equal(folder.image(crop, where=""), np.asarray(folder.original(image, where=""))[
        crop.crop[1] : crop.crop[3], crop.crop[0] : crop.crop[2]])  # fmt: skip


def test_digits_in_the_middle_of_cells():
    """With `grid`, a region of one cell shows the digit asked about, centred."""
    source, _ = scenes("grid=8", questions="{read:1,compare:1,count:0,there:0,colour:0}")
    for index in range(100):
        posed = source.question(index)
        for glyph in posed.scene.glyphs:
            for low, high in ((glyph.box[0], glyph.box[2]), (glyph.box[1], glyph.box[3])):
                assert abs((low + high) / 2 / posed.scene.side * 8 % 1 - 0.5) < 0.04
        region = Region.from_box(posed.box, (posed.scene.side,) * 2, bins=8)
        assert (region.x0, region.y0) == (region.x1, region.y1)
        assert (posed.answer, posed.box) == answer_of(posed)


def test_ink():
    source, _ = scenes("dark=0.0")
    assert not any(glyph.dark for index in range(20) for glyph in source.question(index).scene.glyphs)


def test_kinds_of_perception_may_follow_the_question():
    source, _ = scenes("kinds={read:region,there:none}")
    for index in range(40):
        kind, looks = source.question(index).kind, len(source[index].images[VISION_TOWER])
        # Of those that are not named, conf/data/scenes.yaml names `colour`; the others are drawn from data.actions.
        assert looks == (1 if kind in ("there", "colour") else 2)


def test_there_is_always_something_to_count():
    """In the smallest square that is taken for digits that stand in cells."""
    count = "{read:0,colour:0,count:1}"
    for options in (["cluster=0.17"], ["cluster=0.32", "large=0.5"]):
        source, _ = scenes("grid=8", *options, questions=count)
        assert all(source.question(index).scene.glyphs for index in range(300))
    with pytest.raises(DataError, match=r"set it to 0\.32 or more"):
        scenes("grid=8", "cluster=0.17", "large=0.5", questions=count)


BAD_OPTIONS = {
    "questions={reed:1}": "questions has 'reed'.*did you mean read",
    "kinds={read:dino}": "kinds has 'dino', it takes none, region",
    "canvas=[700,600]": "canvas=",
    "canvas=[100,200]": "8 pixels or more",
    "digit=[0.03,0.2]": "digit=",
    "frame=0.01": "frame=0.01 must lie between",
    "line=0.4": "line=0.4 must be above 0 and leave room",
    "grid=40": "grid=40 must be cells in which a digit has room",
    "dark=1.5": "dark=1.5 must be a share",
    "frames=9": "frames=9 must lie between 1 and 5",
    "crowd=40": "no room for crowd=40",
    "grid=8": "cluster=0.15 may hold no cell of grid=8.*set it to 0.17 or more",
    "enlarged=8": "enlarged=8 a factor from 1 to 5.56",
}


def test_the_small_base_sees_every_canvas_in_a_token_for_each_cell():
    """Whatever its size, as it was pretrained: Qwen's rule of sizes would cut some to 7 x 7."""
    processor = build_model(compose_config("model=small", "data=scenes_small", "encoder=[]")).processor
    first, last = CANVAS
    for side in range(first, last + 1, 9):
        canvas = Image.new("RGB", (side, side))
        assert processor.apply_transform(VISION_TOWER, canvas).grid == (1, CELLS, CELLS), side


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_options_that_no_scene_can_have(option):
    with pytest.raises(DataError, match=BAD_OPTIONS[option]):
        scenes(option) if "questions" not in option else scenes(questions=option.partition("=")[2])


def test_images_of_another_source_are_refused():
    _, folder = scenes("count=10")
    for path in ("test/3", "train/10", "train/x", "0.png"):
        with pytest.raises(DataError, match="not one of the 10 scenes of split train"):
            folder.original(ImageRef(path), where="")


def test_the_baseline_with_the_same_tokens_looks_twice_at_the_whole(make_parts):
    """As many visual tokens as the crop has, out of which no digit can be read."""
    counts = {}
    for name in ("region", "baseline_same_tokens"):
        overrides = (f"+experiment=scenes/{name}", "model=small", f"data.train.scenes.options.questions={READ}")
        config, parts = compose_config(*overrides), make_parts(*overrides)
        (source, _), (folder, _) = build_sources(config.data.train, config, split="train")
        samples = [parts.processor.encode_conversation(source[index], folder) for index in range(12)]
        counts[name] = [[look.tokens for _, look in sample.images[VISION_TOWER]] for sample in samples]
    assert all(sample.record.images[VISION_TOWER][1].crop is None for sample in samples)
    assert {first for look in counts.values() for first, _ in look} == {64}
    second = {name: np.array([tokens for _, tokens in looks]) for name, looks in counts.items()}
    assert np.abs(second["region"] - second["baseline_same_tokens"]).max() <= 2  # 3x3 is next to 2x5
