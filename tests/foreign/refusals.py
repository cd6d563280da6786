# Requests that libnbd would not send if it were asked politely.
for structured in (True, False):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    h.add_meta_context("base:allocation")
    h.connect_uri(uri)
    h.set_strict_mode(0)
    size = h.get_size()

    def refused(expected, call, *arguments):
        try:
            call(*arguments)
        except nbd.Error as error:
            assert error.errnum == expected, (error.errnum, arguments)
        else:
            raise AssertionError(arguments)

    refused(errno.EINVAL, h.pread, 512, size)
    refused(errno.EINVAL, h.pread, 512, size - 511)
    refused(errno.ENOSPC, h.pwrite, b"12", size - 1)
    refused(errno.ENOSPC, h.zero, 512, size)
    refused(errno.EINVAL, h.trim, 512, size)
    refused(errno.EINVAL, h.cache, 512, size)
    refused(errno.EINVAL, h.pread, 512, 1 << 63)
    refused(errno.EINVAL, h.pread, 512, 0, 1 << 8)
    refused(errno.EINVAL, h.pwrite, b"12", 0, 1 << 9)
    refused(errno.EINVAL, h.trim, 512, 0, nbd.CMD_FLAG_NO_HOLE)
    refused(errno.EINVAL, h.flush, nbd.CMD_FLAG_DF)
    if structured:
        refused(errno.EINVAL, h.block_status, 512, size, lambda *_: 0)
        refused(errno.EINVAL, h.block_status, 0, 0, lambda *_: 0)
    else:
        refused(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_DF)
    # Both ends are still in step, and nothing was written.
    assert h.pread(4096, size - 4096) == bytearray(4096)
    h.shutdown()
