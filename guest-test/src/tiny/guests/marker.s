# Marks pages: adds to a word of each of them, in order, after a look whether it is as it was left. Only the first processor does; a tick of
# the others is to do nothing, for long. But for the lines that they print, no other memory is written: where KVM emulates, a ring tells of
# each write.
#
#   word 1  how many pages         word 3  a line every so many ticks
#   word 2  where they begin       word 4  how long a tick idles
#
#   r8   the next to be marked     r9   sweeps: how often all of them were marked

.Lmarker:
    xor r8d, r8d
    xor r9d, r9d

.Lmarker_tick:
    mov rcx, [r14 + 0x40]
    shl rcx, 6
    test r15, r15
    jnz 2f
    shr rcx, 6
    mov rdi, r8
    shl rdi, 12
    add rdi, [r14 + 0x30]
    cmp [rdi], r9
    je 1f
    inc rbp
1:
    inc qword ptr [rdi]
    inc r8
    cmp r8, [r14 + 0x28]
    jb 2f
    xor r8d, r8d
    inc r9
2:
    test rcx, rcx
    jz 4f
3:
    pause
    dec rcx
    jnz 3b
4:
    inc r12
    mov rax, r12
    xor edx, edx
    div qword ptr [r14 + 0x38]
    test rdx, rdx
    jnz .Lmarker_tick
    lea rsi, [rip + .Lmarker_name]
    call .Lbegin_line
    lea rsi, [rip + .Lsweeps]
    mov rax, r9
    call .Lfield
    call .Lend_line
    jmp .Lmarker_tick

.Lmarker_name: .asciz "marker"
    .balign 8
