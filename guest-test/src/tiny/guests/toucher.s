# Touches pages that nobody has touched, one a tick: each has to be zero. It is stamped then, and looked at again for ever.
#
#   word 1  how many pages         word 3  a line every so many ticks
#   word 2  where they begin       word 4  how long a tick idles
#
#   r8   the next to be touched     r10  pages of this processor     rbx  random

.Ltoucher:
    call .Lshare
    xor r8d, r8d
    lea rbx, [r15 + 0x7654321]

.Ltoucher_tick:
    cmp r8, r10
    jae 2f
    mov rcx, r8
    call .Lown_page
    call .Laddress
    mov rsi, rcx
    xor eax, eax
    mov ecx, 512
    repe scasq
    je 1f
    inc rbp
1:
    mov rcx, rsi
    call .Laddress
    mov edx, 1
    call .Lstamp
    mov ecx, 512
    rep stosq
    inc r8
2:
    call .Lrandom
    mov rax, rbx
    xor edx, edx
    div r8
    mov rcx, rdx
    call .Lown_page
    mov edx, 1
    call .Lcheck_page

    inc r12
    mov rax, r12
    xor edx, edx
    div qword ptr [r14 + 0x38]
    test rdx, rdx
    jnz 3f
    lea rsi, [rip + .Ltoucher_name]
    call .Lbegin_line
    lea rsi, [rip + .Ltouched]
    mov rax, r8
    call .Lfield
    call .Lend_line
3:
    mov rax, [r14 + 0x40]
    call .Lidle
    jmp .Ltoucher_tick

.Ltoucher_name: .asciz "toucher"
.Ltouched:      .asciz " touched="
    .balign 8
