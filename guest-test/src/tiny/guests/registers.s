# Keeps a pattern in the SSE registers, the control registers of x87 and SSE, and in r8 to r11, for a while; then looks whether it is there.
#
#   word 1  a line every so many ticks     word 2  how long a pattern is kept

.Lregisters:
    mov rbx, r15
    shl rbx, 12
    add rbx, 0x70000
    # x87 with two digits less and SSE rounding down, which no reset leaves behind.
    fxsave64 [rbx]
    mov word ptr [rbx], 0x027f
    mov dword ptr [rbx + 24], 0x3f80
    fxrstor64 [rbx]

.Lregisters_tick:
    # The pattern of this tick, at rbx + 0x200.
    lea rdi, [rbx + 0x200]
    mov ecx, 0
2:
    mov rdx, r12
    call .Lstamp
    stosq
    inc ecx
    cmp ecx, 36
    jb 2b
    movups xmm0, [rbx + 0x200]
    movups xmm1, [rbx + 0x210]
    movups xmm2, [rbx + 0x220]
    movups xmm3, [rbx + 0x230]
    movups xmm4, [rbx + 0x240]
    movups xmm5, [rbx + 0x250]
    movups xmm6, [rbx + 0x260]
    movups xmm7, [rbx + 0x270]
    movups xmm8, [rbx + 0x280]
    movups xmm9, [rbx + 0x290]
    movups xmm10, [rbx + 0x2a0]
    movups xmm11, [rbx + 0x2b0]
    movups xmm12, [rbx + 0x2c0]
    movups xmm13, [rbx + 0x2d0]
    movups xmm14, [rbx + 0x2e0]
    movups xmm15, [rbx + 0x2f0]
    mov r8, [rbx + 0x300]
    mov r9, [rbx + 0x308]
    mov r10, [rbx + 0x310]
    mov r11, [rbx + 0x318]

    mov rax, [r14 + 0x30]
    call .Lidle

    movups [rbx + 0x400], xmm0
    movups [rbx + 0x410], xmm1
    movups [rbx + 0x420], xmm2
    movups [rbx + 0x430], xmm3
    movups [rbx + 0x440], xmm4
    movups [rbx + 0x450], xmm5
    movups [rbx + 0x460], xmm6
    movups [rbx + 0x470], xmm7
    movups [rbx + 0x480], xmm8
    movups [rbx + 0x490], xmm9
    movups [rbx + 0x4a0], xmm10
    movups [rbx + 0x4b0], xmm11
    movups [rbx + 0x4c0], xmm12
    movups [rbx + 0x4d0], xmm13
    movups [rbx + 0x4e0], xmm14
    movups [rbx + 0x4f0], xmm15
    mov [rbx + 0x500], r8
    mov [rbx + 0x508], r9
    mov [rbx + 0x510], r10
    mov [rbx + 0x518], r11
    lea rsi, [rbx + 0x200]
    lea rdi, [rbx + 0x400]
    mov ecx, 36
    repe cmpsq
    je 3f
    inc rbp
3:
    fxsave64 [rbx]
    cmp word ptr [rbx], 0x027f
    jne 4f
    cmp dword ptr [rbx + 24], 0x3f80
    je 5f
4:
    inc rbp
5:
    inc r12
    mov rax, r12
    xor edx, edx
    div qword ptr [r14 + 0x28]
    test rdx, rdx
    jnz .Lregisters_tick
    lea rsi, [rip + .Lregisters_name]
    call .Lbegin_line
    call .Lend_line
    jmp .Lregisters_tick

.Lregisters_name: .asciz "registers"
    .balign 8
