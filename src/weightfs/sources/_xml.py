"""The one place where XML is parsed: no DTD, no entities, no external references, bounded length."""

from __future__ import annotations

from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from weightfs.core.metalink import MAX_METALINK_BYTES
from weightfs.errors import ChunkListError


def parse_xml(data: bytes) -> Element:
    """The root element of a Metalink document. ChunkListError if it is malformed, hostile or too long."""
    if len(data) > MAX_METALINK_BYTES:
        raise ChunkListError(f"The chunk list has over {MAX_METALINK_BYTES} bytes.")
    try:
        root = fromstring(data, forbid_dtd=True, forbid_entities=True, forbid_external=True)
    except DefusedXmlException as error:
        raise ChunkListError("The chunk list has a DTD or entities, which are refused.") from error
    except (ParseError, ValueError, LookupError) as error:
        raise ChunkListError(f"The chunk list is not well-formed XML ({error}).") from error
    if not isinstance(root, Element):
        raise ChunkListError("The chunk list has no root element.")
    return root
