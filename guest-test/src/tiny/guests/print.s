# Lines on the serial port. One processor prints at a time.

# Begins a line with the text at rsi, and " cpu=" and which processor this is. Loses rax, rcx, rdx, rsi.
.Lbegin_line:
    lock bts dword ptr [rip + .Lprinting], 0
    jnc 2f
    pause
    jmp .Lbegin_line
2:
    call .Ltext
    lea rsi, [rip + .Lcpu]
    mov rax, r15
    call .Lfield
    lea rsi, [rip + .Lticks]
    mov rax, r12
    call .Lfield
    lea rsi, [rip + .Lerrors]
    mov rax, rbp
    call .Lfield
    call .Ltsc
    lea rsi, [rip + .Ltime]
    call .Lfield
    ret

# Ends the line.
.Lend_line:
    mov dx, 0x3f8
    mov al, 10
    out dx, al
    mov dword ptr [rip + .Lprinting], 0
    ret

# Prints the text at rsi, which ends with a zero.
.Ltext:
    mov dx, 0x3f8
2:
    lodsb
    test al, al
    jz 3f
    out dx, al
    jmp 2b
3:
    ret

# Prints the text at rsi and the number in rax. Loses rax, rcx, rdx, rsi.
.Lfield:
    push rax
    call .Ltext
    pop rsi
    mov rax, rsi
    or rax, 1
    bsr rcx, rax
    and ecx, 0x3c
2:
    mov rax, rsi
    shr rax, cl
    and eax, 15
    cmp al, 10
    jb 3f
    add al, 39
3:
    add al, 48
    out dx, al
    sub ecx, 4
    jns 2b
    ret

.Lcpu:      .asciz " cpu="
.Lticks:    .asciz " ticks="
.Lerrors:   .asciz " errors="
.Ltime:     .asciz " tsc="
    .balign 8
.Lprinting: .long 0
