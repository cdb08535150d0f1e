"""The contact sheet: the right frame in the right place, whole or not at all."""

import numpy as np
import pytest
import torch
from PIL import Image

from frame_memory.video.contact import CAPTION, GAP, MISSING, SHEET_SIDE, ContactSheet, SheetSection

from .odd_videos import number_of, numbered_frame

SECTIONS = [SheetSection(i + 1, 1 + 36 * i, 37 + 36 * i) for i in range(5)]
VIDEO = np.stack([numbered_frame(i, 240, 160) for i in range(181)])


def cell(sheet: Image.Image, index: int, columns: int, width=240, height=160) -> np.ndarray:
    left, top = GAP + index % columns * (width + GAP), GAP + index // columns * (height + CAPTION + GAP)
    return np.asarray(sheet.crop((left, top, left + width, top + height)))


@pytest.mark.parametrize("as_floats", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_every_section_shows_its_middle_frame(tmp_path, as_floats, backward):
    sheet = ContactSheet(SECTIONS, 30)
    cuts = [(0, 4), (4, 40), (40, 76), (76, 112), (112, 148), (148, 181)]
    for a, b in reversed(cuts) if backward else cuts:
        piece = torch.from_numpy(VIDEO[a:b])
        sheet.add(a, piece.float() / 255 if as_floats else piece)
    assert sheet.missing == () and sheet.columns == 3
    sheet.save(tmp_path / "contact_sheet.png")
    assert [p.name for p in tmp_path.iterdir()] == ["contact_sheet.png"]
    with Image.open(tmp_path / "contact_sheet.png") as drawn:
        assert drawn.format == "PNG"
        shown = [number_of(cell(drawn.convert("RGB"), i, 3)) for i in range(5)]
    assert shown == [s.shown_frame for s in SECTIONS] == [19, 55, 91, 127, 163]


def test_captions_say_number_and_time():
    sheet = ContactSheet(SECTIONS, 30)
    assert [sheet.caption(s) for s in SECTIONS[:3]] == ["#1  0:00.0", "#2  0:01.2", "#3  0:02.4"]
    assert sheet.caption(SheetSection(60, 2125, 2161)) == "#60  1:10.8"
    drawn = np.asarray(sheet.draw())
    caption = drawn[GAP + 135 : GAP + 135 + CAPTION, GAP : GAP + 100]
    assert caption.max() > 150, "there are letters"


def test_fault_05_unfinished_sections_are_grey_and_named():
    sheet = ContactSheet(SECTIONS, 30)
    sheet.add(112, VIDEO[112:181])
    assert sheet.missing == (1, 2, 3)
    drawn = sheet.draw()
    assert tuple(cell(drawn, 0, 3)[-5, -5]) == MISSING
    assert number_of(cell(drawn, 3, 3)) == 127


def test_a_sheet_of_an_hour_stays_small():
    sheet = ContactSheet([SheetSection(i + 1, 1 + 36 * i, 37 + 36 * i) for i in range(3000)], 30)
    sheet.add(0, VIDEO)
    drawn = sheet.draw()
    assert max(drawn.size) <= SHEET_SIDE + 200 and len(sheet.missing) == 2995


def test_the_frames_are_not_changed_and_nan_draws():
    frames = torch.from_numpy(VIDEO[:40]).float() / 255
    frames[19, 0, 0] = float("nan")
    before = frames.clone()
    sheet = ContactSheet(SECTIONS[:1], 30)
    sheet.add(0, frames)
    sheet.draw()
    assert torch.equal(frames.nan_to_num(9), before.nan_to_num(9))


def test_an_earlier_sheet_stays_when_a_new_one_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "c.png").write_bytes(b"earlier")
    sheet = ContactSheet(SECTIONS, 30)

    def full(self, *args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        sheet.save(tmp_path / "c.png")
    assert [p.name for p in tmp_path.iterdir()] == ["c.png"] and (tmp_path / "c.png").read_bytes() == b"earlier"
