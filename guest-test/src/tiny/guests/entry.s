# Where every processor of a tiny guest begins: in long mode, memory mapped as it is, interrupts off.
#
#   rdi  which processor this is, from 0
#   rsi  the parameters: +8 how many processors there are, +0x20 the words that the guest was started with
#
# The first word says which guest this is. For all of them:
#
#   r15  which processor this is     r12  ticks: what has been done so far
#   r14  the parameters              rbp  errors: what was found to be wrong
#   r13  how many processors
#
# Below 1 MiB is whatever a guest needs besides: descriptors from 0x50000, clocks from 0x60000, buffers from 0x70000, stacks below
# 0x90000; each of them a page a processor.

    mov r15, rdi
    mov r14, rsi
    mov r13, [r14 + 8]
    mov rax, r15
    shl rax, 12
    mov rsp, 0x90000
    sub rsp, rax
    xor r12d, r12d
    xor ebp, ebp
    cld
    mov rax, [r14 + 0x20]
    cmp rax, 0
    je .Lstomper
    cmp rax, 1
    je .Ltimer
    cmp rax, 2
    je .Lregisters
    cmp rax, 3
    je .Ltoucher
    cmp rax, 4
    je .Lmarker
    mov al, 1
    out 0xf4, al
    hlt

# The page in memory that is the rcx-th of this processor: its number to rcx. Loses rax, rdx.
.Lown_page:
    mov rax, rcx
    mul r13
    lea rcx, [rax + r15]
    ret

# What page rcx holds everywhere that was written rdx times: to rax.
.Lstamp:
    mov rax, rcx
    shl rax, 32
    xor rax, rdx
    push rdx
    mov rdx, 0x9e3779b97f4a7c15
    imul rax, rdx
    pop rdx
    ret

# How many pages are this processor's, of those that word 1 says there are: to r10. Loses rax, rdx.
.Lshare:
    mov rax, [r14 + 0x28]
    add rax, r13
    sub rax, r15
    dec rax
    xor edx, edx
    div r13
    mov r10, rax
    ret

# The address of page rcx, of those that begin at word 2: to rdi.
.Laddress:
    mov rdi, rcx
    shl rdi, 12
    add rdi, [r14 + 0x30]
    ret

# The next random number: rbx, which is not 0.
.Lrandom:
    mov rax, rbx
    shl rax, 13
    xor rbx, rax
    mov rax, rbx
    shr rax, 7
    xor rbx, rax
    mov rax, rbx
    shl rax, 17
    xor rbx, rax
    ret

# The time stamp counter: to rax. Loses rdx.
.Ltsc:
    rdtsc
    shl rdx, 32
    or rax, rdx
    ret

# Does nothing rax times.
.Lidle:
    test rax, rax
    jz 3f
2:
    pause
    dec rax
    jnz 2b
3:
    ret
