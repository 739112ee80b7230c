# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import codecs
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headkv_mm.pipelines.reading import read_document, read_documents
from headkv_mm.pipelines.reading.decoding import decode_text
from headkv_mm.pipelines.reading.html import html_text


def minimal_pdf(*pages: str) -> bytes:
    """A PDF file with one line of text per page, written by hand."""
    count = len(pages)
    kids = " ".join(f"{4 + 2 * index} 0 R" for index in range(count))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {count} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for index, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * index} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>",
            f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        ]
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    trailer = (
        f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(out)}"
    )
    return out + f"{trailer}\n%%EOF\n".encode()


def encrypted_pdf(password: str) -> bytes:
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(minimal_pdf("the code is 7"))))
    writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def _write(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize(
    "data",
    [
        "größe 7".encode(),
        codecs.BOM_UTF8 + "größe 7".encode(),
        codecs.BOM_UTF16_LE + "größe 7".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "größe 7".encode("utf-16-be"),
        "größe 7".encode("latin-1"),
    ],
    ids=["utf-8", "utf-8 with mark", "utf-16-le", "utf-16-be", "latin-1"],
)
def test_encodings(tmp_path: Path, data: bytes) -> None:
    assert read_document(_write(tmp_path, "a.txt", data)) == "größe 7"


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1))
def test_any_unicode_text_survives(text: str) -> None:
    assert decode_text(text.encode("utf-8-sig"), "a.txt") == text
    assert decode_text(codecs.BOM_UTF16_LE + text.encode("utf-16-le"), "a.txt") == text


def test_line_ends() -> None:
    assert decode_text(b"a\r\nb\rc\n", "a.txt") == "a\nb\nc\n"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t ", "has no text in it"),
        ("a.txt", b"PK\x03\x04\x00\x00", "is a binary file"),
        ("a.txt", bytes(range(128, 256)) * 4, "is no text in UTF-8"),
        ("a.txt", codecs.BOM_UTF16_LE + b"abc", "says it is utf-16 but is damaged"),
        ("a.html", b"<html><script>var a = 1;</script></html>", "has no text in it"),
        ("a.docx", b"whatever", "is not read here: save it as"),
        ("a.pdf", b"no pdf at all", "is no PDF file"),
        ("a.pdf", b"%PDF-1.4\nand then nothing", "is damaged or no complete PDF file"),
        ("a.pdf", minimal_pdf(""), r"has no text on its 1 page\(s\)"),
        ("a.pdf", minimal_pdf("x")[:200], "is damaged|no pages"),
        ("a.pdf", encrypted_pdf("secret"), "is encrypted with a password"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = _write(tmp_path, name, data)
    with pytest.raises(ValueError, match=message) as caught:
        read_document(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        read_document(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_document(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="no document"):
        read_documents([])


def test_pdf(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _write(tmp_path, "a.pdf", minimal_pdf("The code of the river is 2998.", "The code of the lake is 41."))
    assert read_document(path) == "The code of the river is 2998.\n\nThe code of the lake is 41."
    without_suffix = _write(tmp_path, "download", minimal_pdf("hello"))
    assert read_document(without_suffix) == "hello"
    open_to_all = _write(tmp_path, "open.pdf", encrypted_pdf(""))
    assert read_document(open_to_all) == "the code is 7"
    assert caplog.text == ""


def test_html() -> None:
    page = """<!doctype html><html><head><title>no</title><style>p { color: red }</style></head><body>
    <h1>Rivers &amp; lakes</h1><script>var x = "<p>no</p>";</script>
    <p>The <b>code</b>
       is&nbsp;7.</p><ul><li>one</li><li>two</li></ul>
    <table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table><pre>x
  y</pre></body></html>"""
    assert html_text(page) == "Rivers & lakes\n\nThe code is 7.\n\none\ntwo\n\na b\nc\n\nx\ny"


def test_broken_html() -> None:
    assert html_text("<head><title>x<p>first<p>second<br>third</div>") == "first\n\nsecond\nthird"
    assert html_text("<head><title>x</title><p>first") == "first"


@given(st.text(alphabet="<>/a pscrit\"'=&;!-\n"))
def test_no_html_breaks_the_reader(page: str) -> None:
    text = html_text(page)
    assert text == text.strip()


def test_html_encodings(tmp_path: Path) -> None:
    page = '<meta charset="windows-1251"><p>река</p>'
    assert read_document(_write(tmp_path, "a.html", page.encode("cp1251"))) == "река"
    wrong = '<meta charset="utf-16"><p>река</p>'
    assert read_document(_write(tmp_path, "b.html", wrong)) == "река"
    unknown = '<meta charset="klingon"><p>река</p>'
    assert read_document(_write(tmp_path, "c.html", unknown)) == "река"


def test_several_files_have_headings(tmp_path: Path) -> None:
    first, second = _write(tmp_path, "a.txt", "one\n"), _write(tmp_path, "b.md", "# two")
    assert read_documents([first]) == "one"
    assert read_documents([first, str(second)]) == "a.txt\n\none\n\nb.md\n\n# two"
