"""Fixtures of the tests that run the example graphs."""

import pytest

from scripts import workflow

from .tiny import PICTURE_NAME, SELFTEST_VIDEOS, START_PICTURE


@pytest.fixture(scope="session")
def definitions(server):
    """The server's node definitions."""
    return server.client.object_info()


@pytest.fixture(scope="session")
def picture(server):
    """The self-test's start picture, and its two videos, in the server's input folder."""
    for path in SELFTEST_VIDEOS:
        server.client.upload_image(path, path.name)
    return server.client.upload_image(START_PICTURE, PICTURE_NAME)


@pytest.fixture(scope="session")
def api(definitions, picture):
    """Makes the API format of a graph file."""

    def convert(path):
        return workflow.to_api(workflow.read(path), definitions)

    return convert
