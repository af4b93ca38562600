"""Files of many kinds, made by hand and small."""

import io
import zipfile

_WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
_TYPES = "http://schemas.openxmlformats.org/package/2006/content-types"
_RELATIONS = "http://schemas.openxmlformats.org/package/2006/relationships"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_MAIN = "application/vnd.openxmlformats-officedocument.wordprocessingml"

#: Stands where the converter finds pypdf: does to it whatever a file says.
PARSER = """
import os, signal, time
class Page:
    def __init__(self, text): self.text = text
    def extract_text(self): return self.text
class PdfReader:
    is_encrypted = False
    def __init__(self, file):
        text = file.read().decode()
        if text == "ctrl-c": os.kill(os.getppid(), signal.SIGINT)
        if text in ("hang", "ctrl-c"): time.sleep(600)
        if text == "swell": self.data = bytearray(1 << 40)
        if text == "die": os.abort()
        if text == "print": print("what a parser says", flush=True)
        self.pages = [Page(text + " " + str(os.getpid()))]
"""


def zipped(entries, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def pdf(*texts, password=None):
    """A PDF with a line of text on each page: pypdf writes none."""
    from pypdf import PdfReader, PdfWriter

    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(texts)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(texts)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(texts):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
        objects += [
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R /Resources << /Font << /F1 3 0 R >> >> >>"
            % (5 + 2 * number),
            b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        ]
    out = b"%PDF-1.4\n"
    offsets = []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)
    if password is None:
        return out
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(out)))
    writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


def docx(*paragraphs, doctype=""):
    """A DOCX of paragraphs; ``(1, "text")`` is a heading of level 1."""
    pairs = [(0, item) if isinstance(item, str) else item for item in paragraphs]
    style = '<w:pPr><w:pStyle w:val="Heading{}"/></w:pPr>'
    body = "".join(
        f"<w:p>{style.format(level) if level else ''}<w:r><w:t>{text}</w:t></w:r></w:p>" for level, text in pairs
    )
    styles = "".join(
        f'<w:style w:type="paragraph" w:styleId="Heading{level}"><w:name w:val="heading {level}"/></w:style>'
        for level in (1, 2, 3)
    )
    document = f'{doctype}<w:document xmlns:w="{_WORD}"><w:body>{body}</w:body></w:document>'
    return zipped(
        {
            "[Content_Types].xml": f'<Types xmlns="{_TYPES}"><Default Extension="rels" ContentType="application/vnd.'
            'openxmlformats-package.relationships+xml"/><Default Extension="xml" ContentType="application/xml"/>'
            f'<Override PartName="/word/document.xml" ContentType="{_MAIN}.document.main+xml"/>'
            f'<Override PartName="/word/styles.xml" ContentType="{_MAIN}.styles+xml"/></Types>',
            "_rels/.rels": f'<Relationships xmlns="{_RELATIONS}"><Relationship Id="r1" Type="{_OFFICE}/officeDocument" '
            'Target="word/document.xml"/></Relationships>',
            "word/_rels/document.xml.rels": f'<Relationships xmlns="{_RELATIONS}"><Relationship Id="r1" '
            f'Type="{_OFFICE}/styles" Target="styles.xml"/></Relationships>',
            "word/styles.xml": f'<w:styles xmlns:w="{_WORD}">{styles}</w:styles>',
            "word/document.xml": document,
        }
    )


def pptx(*slides):
    """A PPTX of slides, each (title, text)."""
    import pptx

    deck = pptx.Presentation()
    for title, text in slides:
        slide = deck.slides.add_slide(deck.slide_layouts[1])
        slide.shapes.title.text, slide.placeholders[1].text = title, text
    buffer = io.BytesIO()
    deck.save(buffer)
    return buffer.getvalue()


def xlsx(sheets):
    """An XLSX of sheets by name, each a list of rows."""
    import openpyxl

    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()


def epub(*chapters):
    """An EPUB of chapters, HTML each."""
    items = "".join(
        f'<item id="c{n}" href="{n}.xhtml" media-type="application/xhtml+xml"/>' for n in range(len(chapters))
    )
    spine = "".join(f'<itemref idref="c{number}"/>' for number in range(len(chapters)))
    package = (
        '<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/">'
        f"<dc:title>The book</dc:title></metadata><manifest>{items}</manifest><spine>{spine}</spine></package>"
    )
    container = (
        '<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="book/content.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
    )
    pages = {f"book/{n}.xhtml": f"<html><body>{chapter}</body></html>" for n, chapter in enumerate(chapters)}
    return zipped({"META-INF/container.xml": container, "book/content.opf": package, **pages})


def laughs(element="lolz"):
    """A document type whose one entity ``&lol9;`` is a thousand million times as long."""
    entities = '<!ENTITY lol "lol">' + "".join(
        f'<!ENTITY lol{n} "{f"&lol{n - 1 if n > 1 else str()};" * 10}">' for n in range(1, 10)
    )
    return f"<!DOCTYPE {element} [{entities}]>"
