"""ComfyUI's cache and files that the artist deletes: the fingerprint changes once, and stays after that."""

from frame_memory.sampling.handed_out import HandedOut


def test_the_turn_changes_once_when_a_file_is_gone_or_another_one(tmp_path):
    video, sheet = tmp_path / "p.mp4", tmp_path / "sheet.png"
    video.write_bytes(b"1")
    sheet.write_bytes(b"1")
    made = HandedOut()
    assert made.turn("24") == 0
    made.note("24", video, sheet)
    made.note("7", None, None)
    assert made.turn("24") == made.turn("24") == 0
    video.unlink()
    assert made.turn("24") == made.turn("24") == 1, "asked twice before it is made again"
    video.write_bytes(b"1")
    made.note("24", video, sheet)
    assert made.turn("24") == 1, "the queue after it finds the cache"
    sheet.write_bytes(b"another one")
    assert made.turn("24") == 2
    assert made.turn("7") == 0
