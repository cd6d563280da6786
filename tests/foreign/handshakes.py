# EXPORT_NAME with and without the zeros, GO, INFO, LIST, ABORT, and meta contexts.
size = 8 << 20

for flags in (0, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE, nbd.HANDSHAKE_FLAG_MASK):
    h = nbd.NBD()
    h.set_handshake_flags(flags)
    h.connect_uri(uri)
    fixed = flags & nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE
    assert h.get_protocol() == ("newstyle-fixed" if fixed else "newstyle"), h.get_protocol()
    assert h.get_size() == size
    assert h.pread(512, 512) == bytearray(512)
    h.shutdown()

h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
names = []
h.opt_list(lambda name, description: names.append((name, description)))
assert names == [("disk", "a disk of memory")], names
h.set_export_name("missing")
for ask in (h.opt_info, h.opt_go):
    try:
        ask()
        raise AssertionError("there is no such export")
    except nbd.Error as error:
        assert error.errnum == errno.ENOENT, error
h.set_export_name("")
h.set_full_info(True)
h.opt_info()
assert h.get_canonical_export_name() == "disk"
assert h.get_export_description() == "a disk of memory"
assert h.get_size() == size
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
assert not h.is_read_only()

def contexts(*queries):
    h.clear_meta_contexts()
    for query in queries:
        h.add_meta_context(query)
    seen = []
    h.opt_list_meta_context(lambda name: seen.append(name))
    return seen
both = ["base:allocation", "memferry:dirty"]
assert contexts() == both
assert contexts("base:", "memferry:") == both
assert contexts("memferry:dirty", "qemu:dirty-bitmap:x") == both[1:]
assert contexts("base:nothing") == []
h.clear_meta_contexts()
h.add_meta_context("memferry:dirty")
h.opt_go()
assert h.can_meta_context("memferry:dirty")
assert not h.can_meta_context("base:allocation")
h.shutdown()

h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
h.opt_abort()
assert h.aio_is_closed() or h.aio_is_dead()
