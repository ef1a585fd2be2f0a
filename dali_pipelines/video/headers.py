"""Read from a packet's first bytes what a decoder would make of it: frames that are not shown, and other formats."""

from __future__ import annotations

from collections.abc import Iterator

from av.packet import Packet
from av.video.stream import VideoStream

from dali_pipelines.types import CodedFormat

_H264_SLICE, _H264_IDR, _H264_SPS, _HEVC_SPS = 1, 5, 7, 33  # types of NAL units
_VP9_SYNC = 0x498342
_VP9_RGB = 7  # of its colour spaces, the one without subsampled planes


def has_idr(packet: Packet[VideoStream], stream: VideoStream) -> bool:
    """Return whether an H.264 packet is an IDR frame: no later frame refers to a frame before it."""
    return any(unit[0] & 31 == _H264_IDR for unit in _units(packet, stream))


def is_shown_once(packet: Packet[VideoStream], stream: VideoStream) -> bool:
    """Return whether a packet decodes to exactly one frame that is shown.

    VP8 and VP9 have reference frames that are not shown. H.264 may have two fields.
    """
    codec, data = stream.codec.canonical_name, bytes(packet)
    if codec == "h264":  # H.264, 7.3.3: a slice begins with the number of its first macroblock, 0 as the bit 1
        slices = [unit for unit in _units(packet, stream) if unit[0] & 31 in (_H264_SLICE, _H264_IDR)]
        return sum(unit[1:2] >= b"\x80" for unit in slices) == 1
    if codec == "vp8":  # RFC 6386, 9.1: show_frame
        return bool(data[0] & 0x10)
    if codec != "vp9":
        return True
    # VP9 bitstream specification, section 6.2 for profiles 0 to 2: show_existing_frame, frame_type, show_frame. Annex
    # B: the index of a superframe, which says how many frames it holds, less one.
    last = data[-1]
    index_size = 2 + ((last >> 3 & 3) + 1) * ((last & 7) + 1)
    is_index = last & 0xE0 == 0xC0 and data[-index_size : len(data) - index_size + 1] == data[-1:]
    return data[0] & 0x0A == 0x02 and not (is_index and last & 7)


def keeps_format(packet: Packet[VideoStream], stream: VideoStream, coded: CodedFormat) -> bool:
    """Return whether a packet of one frame keeps to a size and pixel format.

    DALI 2.4 decodes VP8 and VP9 streams that change theirs to garbage, without a word.
    """
    match stream.codec.canonical_name:
        case "vp8":
            return _vp8_size(bytes(packet)) in (None, (coded.width, coded.height))
        case "vp9":
            return _vp9_keeps_format(bytes(packet), coded)
        case "h264" | "hevc" as codec:
            # A sequence parameter set holds the format. Any that is not the stream's own may be another format.
            if packet.has_sidedata("new_extradata"):
                return False
            header = stream.codec_context.extradata or b""
            sets = (unit for unit in _units(packet, stream) if _is_parameter_set(unit, codec))
            return all(unit.rstrip(b"\0") in header for unit in sets)
    return True


def _vp8_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height of a VP8 keyframe (RFC 6386, 9.1: 14 bits each, then scaling); None for other frames."""
    if data[0] & 1:
        return None
    return int.from_bytes(data[6:8], "little") & 0x3FFF, int.from_bytes(data[8:10], "little") & 0x3FFF


def _vp9_keeps_format(data: bytes, coded: CodedFormat) -> bool:
    """Read the uncompressed header of a VP9 frame (bitstream specification, 6.2 and 7.2).

    A frame that takes its size from a reference has that of a frame before it, so that only sizes that are written out
    can change anything.
    """
    bits = _Bits(data)
    bits.read(2)
    profile = bits.read(1) | bits.read(1) << 1
    if profile == 3:
        bits.read(1)
    if bits.read(1):  # show_existing_frame
        return True
    is_inter, is_shown, is_resilient = bits.read(1), bits.read(1), bits.read(1)
    pixels = ""
    if not is_inter:
        if bits.read(24) != _VP9_SYNC:
            return False
        pixels = _vp9_pixels(bits, profile)
    else:
        is_intra_only = 0 if is_shown else bits.read(1)
        if not is_resilient:
            bits.read(2)  # reset_frame_context
        if is_intra_only:
            if bits.read(24) != _VP9_SYNC:
                return False
            pixels = _vp9_pixels(bits, profile) if profile else "yuv420p"
            bits.read(8)  # refresh_frame_flags
        else:
            bits.read(8 + 3 * 4)  # refresh_frame_flags; three references with sign biases
            if any(bits.read(1) for _ in range(3)):  # found_ref
                return True
    size = bits.read(16) + 1, bits.read(16) + 1
    return size == (coded.width, coded.height) and pixels in ("", coded.pixel_format)


def _vp9_pixels(bits: _Bits, profile: int) -> str:
    """Read a VP9 color_config and return FFmpeg's name of the pixel format."""
    depth = "" if profile < 2 else ("12le" if bits.read(1) else "10le")
    if bits.read(3) == _VP9_RGB:
        bits.read(profile & 1)  # reserved
        return f"gbrp{depth}"
    bits.read(1)  # color_range
    layout = (bits.read(1), bits.read(1)) if profile & 1 else (1, 1)
    names = {(1, 1): "yuv420p", (1, 0): "yuv422p", (0, 1): "yuv440p", (0, 0): "yuv444p"}
    if profile & 1:
        bits.read(1)  # reserved
    return names[layout] + depth


class _Bits:
    """The bits of a frame header, the highest of each byte first; zeros follow the end."""

    def __init__(self, data: bytes) -> None:
        self.value = int.from_bytes(data[:32].ljust(32, b"\0"), "big")
        self.left = 256

    def read(self, count: int) -> int:
        self.left -= count
        return self.value >> self.left & (1 << count) - 1


def _is_parameter_set(unit: bytes, codec: str) -> bool:
    return unit[0] & 31 == _H264_SPS if codec == "h264" else unit[0] >> 1 & 63 == _HEVC_SPS


def _units(packet: Packet[VideoStream], stream: VideoStream) -> Iterator[bytes]:
    """Yield the NAL units of an H.264 or HEVC packet, which are marked by start codes or by their lengths."""
    data, header = bytes(packet), stream.codec_context.extradata or b""
    if header[:1] != b"\1":
        yield from filter(None, data.split(b"\0\0\1")[1:])  # start codes
        return
    # The size of a length, less one: in byte 4 of an avcC box, in byte 21 of an hvcC box.
    field = header[4] if stream.codec.canonical_name == "h264" else header[21]
    place, width = 0, (field & 3) + 1  # lengths
    while place + width < len(data):
        length = int.from_bytes(data[place : place + width], "big")
        if length:
            yield data[place + width : place + width + length]
        place += width + length
