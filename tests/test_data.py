"""Data sets: what is read, what is refused in one line with the path, and what is never touched."""

import hashlib
import io
import pickle
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from federation.task import image_files
from federation.task.task import DataError, open_task

import numpy as np
import pytest
import torch
from helpers.processes import free_port
from PIL import Image

import data
from data import SIDE, Cifar10, Folder, Synthetic, open_dataset

GREY = (70, 70, 70)


def read_image(path: str) -> np.ndarray:
    return image_files.read_image(path, SIDE)


def put(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (32, 32), GREY)).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of two images each, in train and in test; the greys tell them apart."""
    for split, shift in (("train", 0), ("test", 100)):
        for grey, name in ((10, "dog/b.png"), (20, "dog/a.JPEG"), (30, "cat/2.bmp"), (40, "cat/10.png")):
            put(tmp_path / split / name, Image.new("RGB", (32, 32), (grey + shift,) * 3))
    return tmp_path


# A folder of images


def test_a_folder_is_read_in_sorted_order(root):
    folder = Folder(str(root))
    assert folder.classes == ["cat", "dog"]
    assert folder.labels("train", 0).tolist() == [0, 0, 1, 1]
    assert folder.labels("train", 0).dtype == np.int64
    images = folder.images("train", np.arange(4), 0)
    assert (images.shape, images.dtype) == ((4, 3, 32, 32), np.uint8)
    assert images[:, 0, 0, 0].tolist() == [40, 30, 20, 10]  # cat/10, cat/2, dog/a, dog/b
    assert folder.images("test", np.array([3, 0]), 0)[:, 2, 31, 31].tolist() == [110, 140]


def test_only_the_images_asked_for_are_decoded(root):
    broken = root / "train" / "cat" / "10.png"
    broken.write_bytes(b"no image")
    folder = Folder(str(root))
    assert folder.images("train", np.array([1, 2, 3]), 0)[:, 0, 0, 0].tolist() == [30, 20, 10]
    with pytest.raises(DataError) as caught:
        folder.images("train", np.array([0]), 0)
    assert str(caught.value) == (
        f"{broken} is not a readable image (UnidentifiedImageError); "
        "repair or remove it, or leave it out with --skip-damaged"
    )
    assert caught.value.public == "1 of its 1 images can't be read"


def test_files_that_are_no_images_and_loose_files_are_left_alone(root):
    for name in ("train/cat/notes.txt", "train/cat/Thumbs.db", "train/readme.md", "test/list.csv"):
        (root / name).write_text("not an image")
    folder = Folder(str(root))
    assert folder.classes == ["cat", "dog"]
    assert len(folder.labels("train", 0)) == 4


def refusal(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        Folder(str(root))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_split_is_named_with_the_layout_that_is_wanted(root):
    (root / "test").rename(root / "tset")
    assert (
        refusal(root) == f"{root}/test is not a folder; --dataset FOLDER must hold train/<class>/* and test/<class>/*"
    )


def test_different_classes_in_train_and_test_are_named(root):
    (root / "test" / "dog").rename(root / "test" / "wolf")
    assert refusal(root) == (
        f"{root}: train and test have different classes (dog, wolf in one only); "
        "give both the same subfolders, an empty one where there is no image"
    )


def test_a_class_without_a_single_image_is_one_that_others_may_have(root):
    for split in ("train", "test"):
        (root / split / "bird").mkdir()
    folder = Folder(str(root))
    assert folder.classes == ["bird", "cat", "dog"]
    assert folder.labels("train", 0).tolist() == [1, 1, 2, 2]


def test_the_federations_classes_are_taken_over_in_their_order(root):
    folder = Folder(str(root))
    folder.adopt(["ape", "dog", "cat"])
    assert folder.labels("train", 0).tolist() == [1, 1, 2, 2]
    assert folder.images("train", np.arange(4), 0)[:, 0, 0, 0].tolist() == [20, 10, 40, 30]  # dogs, then cats


def test_a_folder_without_any_image_is_refused(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    assert refusal(tmp_path) == f"{tmp_path}/train holds no image files in class folders; put some there"


HIDDEN = [
    ".ipynb_checkpoints/x.png",
    "__MACOSX/cat/1.png",
    "@eaDir/1.png",
    "cat/._10.png",
    "cat/Thumbs.db",
    "cat/.a/1.png",
]


def test_hidden_and_system_folders_and_files_are_no_classes_and_no_images(root, capsys):
    for name in HIDDEN:
        put(root / "train" / "tmp.png").rename(put(root / "train" / name, format="PNG"))
    folder = Folder(str(root))
    assert folder.classes == ["cat", "dog"]
    assert len(folder.labels("train", 0)) == 4
    assert capsys.readouterr().out == ""


def test_images_one_folder_deeper_count_and_what_is_left_out_is_said_with_its_number(root, capsys):
    put(root / "train/cat/2024/01.jfif", Image.new("RGB", (32, 32), (50,) * 3), format="JPEG")
    for name in ("cat/1.dcm", "cat/2024/2.DCM", "dog/list.csv", "dog/README"):
        (root / "train" / name).write_text("x")
    folder = Folder(str(root))
    assert folder.labels("train", 0).tolist() == [0, 0, 0, 1, 1]
    assert folder.images("train", np.array([2]), 0)[0, 0, 0, 0] == pytest.approx(50, abs=2)
    assert capsys.readouterr().out == (f"{root}/train: left out what is no image file: 2 .dcm, 1 .csv, 1 no ending\n")


def test_a_class_is_known_by_the_composed_form_of_its_name(root):
    for split in ("train", "test"):
        put(root / split / "cafe\u0301" / "1.png")
    assert Folder(str(root)).classes == ["caf\u00e9", "cat", "dog"]


def test_damaged_images_are_all_named_at_once_and_no_name_is_for_other_eyes(root):
    damaged = [root / "train/cat/10.png", root / "train/dog/b.png"]
    for path in damaged:
        path.write_bytes(b"jane doe")
    with pytest.raises(DataError) as caught:
        Folder(str(root)).images("train", np.arange(4), 0)
    assert all(str(path) in str(caught.value) for path in damaged)
    assert str(caught.value).startswith("2 images can't be read: ")
    assert str(caught.value).endswith("Repair or remove them, or leave them out with --skip-damaged")
    assert caught.value.public == "2 of its 4 images can't be read"


def test_damaged_images_are_left_out_where_that_is_asked_for(root, capsys):
    (root / "train/cat/10.png").write_bytes(b"")
    folder = open_dataset(str(root), "", skip_damaged=True)
    assert folder.labels("train", 0).tolist() == [0, 1, 1]
    assert folder.images("train", np.arange(3), 0)[:, 0, 0, 0].tolist() == [30, 20, 10]
    assert capsys.readouterr().out == (
        f"left out: {root}/train/cat/10.png is not a readable image (UnidentifiedImageError)\n"
    )


def test_a_folder_that_may_not_be_read_is_refused_in_one_line(root, monkeypatch):
    def list_images(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(image_files, "list_images", list_images)
    with pytest.raises(DataError) as caught:
        open_dataset(str(root), "")
    assert str(caught.value) == f"{root}/train can't be read (Permission denied); give this user the right to"


def test_the_task_gives_images_and_labels_as_tensors_in_the_order_of_the_rows(root):
    task, folder = open_task(), Folder(str(root))
    images, labels = task.load(folder, "train", np.array([1, 2]), 0)
    assert (images.shape, images.dtype) == ((2, 3, 32, 32), torch.uint8)
    assert (images[:, 0, 0, 0].tolist(), labels.tolist(), labels.dtype) == ([30, 20], [0, 1], torch.int64)
    assert task.schema(folder) == {"classes": ["cat", "dog"], "input_shape": [3, 32, 32]}
    task.adopt(folder, ["ape", "cat", "dog"])
    assert task.schema(folder)["classes"] == ["ape", "cat", "dog"]
    assert task.labels(folder, "train", 0).tolist() == [1, 1, 2, 2]
    assert task.size(folder, "train", 0) == 4


def test_one_file_is_read_as_an_example_of_its_own(root):
    images, labels = data.read_example(str(root / "train/dog/b.png"), {})
    assert (images.shape, images.dtype, len(labels)) == ((1, 3, 32, 32), torch.uint8, 1)
    assert images.unique().tolist() == [10]


def test_a_name_that_is_nothing_is_refused():
    with pytest.raises(
        DataError, match=r"^--dataset 'cifra10' is neither cifar10, nor synthetic, nor a folder that exists$"
    ):
        open_dataset("cifra10", "data")


# One image file

SIXTEEN_BITS = Image.fromarray(np.full((32, 32), 70 * 256, np.uint16))
PALETTE = Image.new("RGB", (32, 32), GREY).quantize(4)
IMAGES = {  # all of them grey 70
    "rgb.png": (Image.new("RGB", (32, 32), GREY), {}),
    "greyscale.png": (Image.new("L", (32, 32), 70), {}),
    "opaque.png": (Image.new("RGBA", (32, 32), (*GREY, 255)), {}),
    "opaque greyscale.png": (Image.new("LA", (32, 32), (70, 255)), {}),
    "palette.png": (PALETTE, {}),
    "palette.gif": (PALETTE, {}),
    "16 bits.png": (SIXTEEN_BITS, {}),
    "16 bits.tif": (SIXTEEN_BITS, {}),
    "16 bits.pgm": (SIXTEEN_BITS, {}),
    "CMYK.tif": (Image.new("CMYK", (32, 32), (185, 185, 185, 0)), {}),
    "one pixel.png": (Image.new("RGB", (1, 1), GREY), {}),
    "column.png": (Image.new("RGB", (1, 500), GREY), {}),
    "row.png": (Image.new("RGB", (500, 1), GREY), {}),
    "large.webp": (Image.new("RGB", (300, 200), GREY), {"lossless": True}),
    "LARGE.PNG": (Image.new("RGB", (300, 200), GREY), {}),
}


def grey(values: list[list[float]], dtype: type) -> Image.Image:
    return Image.fromarray(np.kron(np.array(values), np.ones((16, 32))).astype(dtype))


@pytest.mark.parametrize(
    ("values", "dtype", "seen"),
    [
        ([[0], [4095]], np.uint16, [0, 255]),  # 12 bits in 16
        ([[0], [1023]], np.uint16, [0, 255]),
        ([[128], [65535]], np.uint16, [0, 255]),
        ([[0], [200]], np.uint16, [0, 200]),  # 8 bits in 16
        ([[-1000], [3000]], np.int32, [0, 255]),  # a CT's Hounsfield units
        ([[70000], [140000]], np.int32, [0, 255]),
        ([[0], [4095]], np.int32, [0, 255]),
        ([[0.0], [1.0]], np.float32, [0, 255]),
        ([[0.0], [0.5]], np.float32, [0, 128]),
        ([[10.0], [200.0]], np.float32, [10, 200]),
        ([[-2.0], [6.0]], np.float32, [0, 255]),
    ],
)
def test_grey_values_of_any_depth_come_out_as_a_person_would_see_them(tmp_path, values, dtype, seen):
    pixels = read_image(str(put(tmp_path / "deep.tif", grey(values, dtype))))
    assert [int(pixels[0, 0, 0]), int(pixels[0, 31, 0])] == seen


def test_values_that_are_no_numbers_are_refused(tmp_path):
    path = put(tmp_path / "nan.tif", grey([[0], [np.nan]], np.float32))
    with pytest.raises(DataError, match=r"is not a readable image \(it holds values that are no numbers\)$"):
        read_image(str(path))


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_an_image_is_turned_as_its_exif_data_says(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    picture = Image.fromarray(np.kron(np.array([[0], [255]], np.uint8), np.ones((16, 32), np.uint8))).convert("RGB")
    pixels = read_image(str(put(tmp_path / f"turned.{kind}", picture, exif=exif)))
    assert pixels[0, 16, 2] > 200  # what was the lower half is on the left
    assert pixels[0, 16, 29] < 50


def test_whatever_a_decoder_raises_is_a_readable_line(tmp_path, monkeypatch):
    path = put(tmp_path / "one.png")
    for error in (KeyError("x"), IndexError(), RuntimeError("a codec's own"), MemoryError()):
        monkeypatch.setattr(Image, "open", lambda file, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(DataError, match=rf"^{path} is not a readable image \({type(error).__name__}\)$"):
            read_image(str(path))


@pytest.mark.parametrize(("name", "image"), IMAGES.items(), ids=IMAGES)
def test_every_kind_of_image_becomes_32_by_32_in_rgb(tmp_path, name, image):
    picture, options = image
    pixels = read_image(str(put(tmp_path / name, picture, **options)))
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), np.uint8)
    assert np.unique(pixels).tolist() == [70]


TRANSPARENT = {
    "alpha.png": (Image.new("RGBA", (32, 32), (*GREY, 0)), {}),
    "grey alpha.png": (Image.new("LA", (32, 32), (70, 0)), {}),
    "palette.png": (PALETTE, {"transparency": bytes(4)}),
    "one colour.png": (Image.new("RGB", (32, 32), GREY), {"transparency": GREY}),
    "one grey.png": (Image.new("L", (32, 32), 70), {"transparency": 70}),
}


@pytest.mark.parametrize(("name", "image"), TRANSPARENT.items(), ids=TRANSPARENT)
def test_what_is_transparent_becomes_white(tmp_path, name, image):
    picture, options = image
    assert np.unique(read_image(str(put(tmp_path / name, picture, **options)))).tolist() == [255]


def test_an_oblong_keeps_its_middle_square(tmp_path):
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 200
    assert np.unique(read_image(str(put(tmp_path / "a.png", Image.fromarray(pixels))))).tolist() == [200]


def test_channels_come_first_and_rows_before_columns(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[3, 5] = (1, 2, 3)
    assert read_image(str(put(tmp_path / "a.png", Image.fromarray(pixels))))[:, 3, 5].tolist() == [1, 2, 3]


@pytest.mark.parametrize("damage", ["empty", "cut short", "a folder"])
def test_an_unreadable_image_is_one_line_with_its_path(tmp_path, damage):
    path = tmp_path / "a.jpg"
    if damage == "a folder":
        path.mkdir()
    else:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        whole = put(path, Image.fromarray(noise)).read_bytes()
        path.write_bytes(b"" if damage == "empty" else whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"^{path} is not a readable image \(\w+\)$"):
        read_image(str(path))


# Generated images


@pytest.mark.slow
def test_generated_images_are_a_function_of_the_seed():
    everything = np.arange(1500)
    one, again, other = (Synthetic().images("test", everything, seed) for seed in (1, 1, 2))
    assert (one.shape, one.dtype) == ((1500, 3, 32, 32), np.uint8)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_a_generated_image_does_not_depend_on_which_others_are_asked_for():
    some = np.array([7, 3, 1400])
    assert np.array_equal(Synthetic().images("test", some, 0), Synthetic().images("test", np.arange(1500), 0)[some])


def test_generated_training_and_test_images_differ():
    some = np.arange(20)
    assert not np.array_equal(Synthetic().images("train", some, 0), Synthetic().images("test", some, 0))


def test_generated_images_have_ten_classes_of_the_same_size():
    dataset = Synthetic()
    assert len(set(dataset.classes)) == 10
    for split, size in (("train", 600), ("test", 150)):
        assert np.bincount(dataset.labels(split, 0)).tolist() == [size] * 10


@pytest.mark.slow
def test_generated_images_take_less_than_two_seconds():
    began = time.process_time()  # not the clock on the wall: other programs may be at work
    for split, n in Synthetic().sizes.items():
        Synthetic().images(split, np.arange(n), 0)
    assert time.process_time() - began < 2


# CIFAR-10: torchvision's own code against a small archive of the same layout on a server of ours


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


class Mirror(ThreadingHTTPServer):
    """Serves one file, and counts how often it was fetched."""

    daemon_threads = True

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.requests, self.fetched = content, 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}/cifar-10-python.tar.gz"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.requests += 1
        time.sleep(0.05)  # long enough for another client to come meanwhile
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        # torchvision asks twice: first it opens the address only to see where it leads, and hangs up.
        try:
            self.wfile.write(self.server.content)
            self.server.fetched += 1
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def mirror(monkeypatch):
    """torchvision's CIFAR10 turned towards an archive of 5 × 20 training and 10 test images on this machine."""
    from torchvision.datasets import CIFAR10

    files, train, test = {}, [], []
    for number, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        n = 10 if name == "test_batch" else 20
        pixels = np.full((n, 3072), number, np.uint8)
        pixels[:, 0], pixels[:, 1024], pixels[:, 2047] = 100, 150, 200  # red first, green first, green last
        files[name] = pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(n)]}, protocol=2)
        (test if name == "test_batch" else train).append([name, md5(files[name])])
    files["batches.meta"] = pickle.dumps({"label_names": CLASSES}, protocol=2)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    server = Mirror(packed.getvalue())
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")  # whatever this machine's proxy is, it isn't asked for ourselves
    monkeypatch.setattr(CIFAR10, "url", server.url)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(server.content))
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(files["batches.meta"])})
    yield server
    server.shutdown()
    server.server_close()


# Python 3.12 and 3.13 tell torchvision that 3.14 will unpack archives more carefully.
careless_archive = pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")


@careless_archive
@pytest.mark.slow
def test_cifar10_is_downloaded_once(mirror, tmp_path):
    root = str(tmp_path / "not" / "there" / "yet")
    first = Cifar10(root)
    asked = mirror.requests
    assert asked > 0
    second = open_dataset("cifar10", root)
    assert second.classes == first.classes == CLASSES
    assert second.labels("train", 0).tolist() == [i % 10 for i in range(100)]
    assert mirror.requests == asked


@careless_archive
@pytest.mark.slow
def test_a_complete_cifar10_is_used_without_writing_and_a_damaged_file_of_it_is_named(mirror, tmp_path):
    Cifar10(str(tmp_path))
    (tmp_path / ".download.lock").unlink(missing_ok=True)
    assert Cifar10(str(tmp_path)).labels("train", 0).size == 100
    assert not (tmp_path / ".download.lock").exists()
    mirror.content = b""
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    damaged = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    damaged.write_bytes(b"x")
    with pytest.raises(DataError, match=f"{damaged} is damaged; ") as caught:
        Cifar10(str(tmp_path))
    assert caught.value.public == "its data can't be read"


@careless_archive
def test_cifar10_images_are_those_asked_for_with_channels_first(mirror, tmp_path):
    dataset = Cifar10(str(tmp_path))
    images = dataset.images("train", np.array([99, 0, 45]), 0)
    assert (images.shape, images.dtype) == ((3, 3, 32, 32), np.uint8)
    assert images[:, 2, 9, 9].tolist() == [4, 0, 2]  # the numbers of their batches
    assert (images[0, 0, 0, 0], images[0, 1, 0, 0], images[0, 1, 31, 31]) == (100, 150, 200)
    assert dataset.images("test", np.arange(10), 0)[:, 2, 9, 9].tolist() == [5] * 10
    assert dataset.labels("test", 0).tolist() == list(range(10))


@careless_archive
def test_of_two_that_come_at_once_one_downloads(mirror, tmp_path):
    with ThreadPoolExecutor(2) as both:
        results = list(both.map(lambda _: Cifar10(str(tmp_path)).classes, range(2)))
    assert results == [CLASSES, CLASSES]
    alone = mirror.requests
    Cifar10(str(tmp_path / "other"))
    assert mirror.requests == 2 * alone  # so the two asked no more often than this one


def cifar10_refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        Cifar10(str(folder))
    words = str(caught.value)
    assert words.startswith(f"CIFAR-10 can't be had in {folder} (")
    assert words.endswith("; use --dataset synthetic, or --dataset FOLDER with images of your own")
    assert "\n" not in words
    return words


def test_a_damaged_archive_is_refused_in_one_line_and_nothing_is_unpacked(mirror, tmp_path):
    mirror.content = mirror.content[:-100] + bytes(100)
    assert "RuntimeError: File not found or corrupted." in cifar10_refusal(tmp_path)
    assert not list(tmp_path.glob("cifar-10-batches-py"))


@careless_archive
def test_after_a_damaged_download_the_next_one_starts_anew(mirror, tmp_path):
    whole, mirror.content = mirror.content, b"damaged"
    cifar10_refusal(tmp_path)
    mirror.content = whole
    assert Cifar10(str(tmp_path)).classes == CLASSES


def test_without_a_network_the_reason_and_both_ways_out_are_told(mirror, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{free_port()}/cifar-10-python.tar.gz")
    assert "Connection refused" in cifar10_refusal(tmp_path)


def test_a_data_folder_that_cant_be_made_is_refused_in_one_line():
    assert "NotADirectoryError" in cifar10_refusal(Path("/dev/null/data"))
