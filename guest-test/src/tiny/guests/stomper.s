# Stamps pages and looks whether the stamps of earlier are still there. A tick: one page checked, in order; one page stamped.
#
#   word 1  how many pages         word 4  stamped at random (1) or in order (0)
#   word 2  where they begin       word 5  a line every so many ticks
#   word 3  where the table is     word 6  how long a tick idles
#   word 7  whether every processor but the first has one page alone
#
# The table has, for each page, how often it was stamped. The stamp of a page follows from that and fills it.
#
#   r8   the next to be checked     r10  pages of this processor     rbx  random
#   r9   sweeps: how often all of them were checked                  r11  the last that was stamped

.Lstomper:
    call .Lshare
    cmp qword ptr [r14 + 0x58], 0
    je 2f
    test r15, r15
    jz 2f
    mov r10d, 1
2:
    xor r8d, r8d
    xor r9d, r9d
    xor r11d, r11d
    lea rbx, [r15 + 0x1234567]

.Lstomper_tick:
    mov rcx, r8
    call .Lown_page
    mov rax, [r14 + 0x38]
    mov rdx, [rax + rcx * 8]
    test rdx, rdx
    jz 2f
    call .Lcheck_page
2:
    inc r8
    cmp r8, r10
    jb 3f
    xor r8d, r8d
    inc r9
3:
    cmp qword ptr [r14 + 0x40], 0
    je 4f
    call .Lrandom
    mov rax, rbx
    xor edx, edx
    div r10
    mov r11, rdx
    jmp 5f
4:
    inc r11
    cmp r11, r10
    jb 5f
    xor r11d, r11d
5:
    mov rcx, r11
    call .Lown_page
    mov rsi, [r14 + 0x38]
    lea rsi, [rsi + rcx * 8]
    mov rdx, [rsi]
    inc rdx
    call .Lstamp
    call .Laddress
    mov ecx, 512
    rep stosq
    mov [rsi], rdx

    inc r12
    mov rax, r12
    xor edx, edx
    div qword ptr [r14 + 0x48]
    test rdx, rdx
    jnz 6f
    lea rsi, [rip + .Lstomper_name]
    call .Lbegin_line
    lea rsi, [rip + .Lsweeps]
    mov rax, r9
    call .Lfield
    call .Lend_line
6:
    mov rax, [r14 + 0x50]
    call .Lidle
    jmp .Lstomper_tick

# Looks whether page rcx is what it is after rdx stamps. Loses rax, rcx, rdx, rsi, rdi.
.Lcheck_page:
    call .Lstamp
    call .Laddress
    mov rsi, rcx
    mov ecx, 512
    repe scasq
    jne 2f
    ret
2:
    inc rbp
    cmp rbp, 8
    ja 3f
    push rsi
    push rdx
    push rax
    push qword ptr [rdi - 8]
    lea rsi, [rip + .Lwrong]
    call .Lbegin_line
    lea rsi, [rip + .Lfound]
    pop rax
    call .Lfield
    lea rsi, [rip + .Lexpected]
    pop rax
    call .Lfield
    lea rsi, [rip + .Lversion]
    pop rax
    call .Lfield
    lea rsi, [rip + .Lpage]
    pop rax
    call .Lfield
    call .Lend_line
3:
    ret

.Lstomper_name: .asciz "stomper"
.Lsweeps:       .asciz " sweeps="
.Lwrong:        .asciz "wrong"
.Lfound:        .asciz " found="
.Lexpected:     .asciz " expected="
.Lversion:      .asciz " version="
.Lpage:         .asciz " page="
    .balign 8
