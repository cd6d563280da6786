# Every command with every flag, with structured replies and with simple ones.
for structured in (True, False):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    h.add_meta_context("base:allocation")
    h.add_meta_context("memferry:dirty")
    h.connect_uri(uri)
    size = h.get_size()
    assert size == 8 << 20
    assert h.get_structured_replies_negotiated() == structured
    assert h.can_df() == structured
    assert h.can_meta_context("base:allocation") == structured
    assert h.can_meta_context("memferry:dirty") == structured

    h.trim(size, 0)
    assert h.pread(4096, 0) == bytearray(4096)
    data = bytearray(range(256)) * 2048
    h.pwrite(data, 12345)
    h.pwrite(b"x", size - 1, nbd.CMD_FLAG_FUA)
    h.flush()
    assert h.pread(len(data), 12345) == data
    assert h.pread(2, size - 2) == b"\0x"
    h.cache(size, 0)

    h.zero(8192, 16384)
    assert h.pread(8194, 16383) == data[4038:4039] + bytearray(8192) + data[12231:12232]
    h.zero(4096, 65536, nbd.CMD_FLAG_NO_HOLE)
    h.zero(4096, 69632, nbd.CMD_FLAG_FUA)
    try:
        h.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
        raise AssertionError("zeros that are written are not fast")
    except nbd.Error as error:
        assert error.errnum == errno.ENOTSUP, error
    h.trim(4096, 131072, nbd.CMD_FLAG_FUA)

    chunks = []
    def chunk(buf, offset, status, error):
        chunks.append((offset, len(buf), status))
    got = h.pread_structured(1 << 20, 0, chunk)
    assert got == h.pread(1 << 20, 0)
    assert sum(length for _, length, _ in chunks) == 1 << 20
    if structured:
        assert any(status == nbd.READ_HOLE for _, _, status in chunks), chunks
        chunks.clear()
        assert h.pread_structured(1 << 20, 0, chunk, nbd.CMD_FLAG_DF) == got
        assert chunks == [(0, 1 << 20, nbd.READ_DATA)], chunks

        extents = {}
        def extent(context, offset, entries, error):
            extents[context] = entries
        h.block_status(size, 0, extent)
        for context in ("base:allocation", "memferry:dirty"):
            entries = extents[context]
            assert sum(entries[::2]) == size, entries
        # The first bytes were never written, and trimming them is writing.
        assert extents["base:allocation"][:2] == [12288, 3], extents
        h.block_status(size, 0, extent, nbd.CMD_FLAG_REQ_ONE)
        assert all(len(entries) == 2 for entries in extents.values()), extents
    else:
        assert chunks == [(0, 1 << 20, nbd.READ_DATA)], chunks
    h.shutdown()
