# Halts, and is woken by a timer: a tick. Neither the time stamp counter nor KVM's clock may go back.
#
#   word 1  how long a tick of the local APIC's timer is, in nanoseconds
#   word 2  how long one of the PIT is, in periods of 1193182 Hz, if the first processor is to use that; else 0
#   word 3  a line every so many ticks
#
#   rbx  the time stamp counter of the last tick     r8  KVM's clock, when last read
#   r9   where KVM writes its clock                  r10  the tick at which the next line is printed

.Ltimer:
    # An interrupt descriptor table of this processor's own, with one gate.
    mov rdi, r15
    shl rdi, 12
    add rdi, 0x50000
    lea rax, [rip + .Ltimer_tick]
    mov [rdi + 0x400], ax
    mov word ptr [rdi + 0x402], 0x10
    mov word ptr [rdi + 0x404], 0x8e00
    shr rax, 16
    mov [rdi + 0x406], ax
    mov qword ptr [rdi + 0x408], 0
    sub rsp, 16
    mov word ptr [rsp], 0xfff
    mov [rsp + 2], rdi
    lidt [rsp]

    # KVM's clock.
    mov r9, r15
    shl r9, 12
    add r9, 0x60000
    xor r8d, r8d
    mov ecx, 0x4b564d01
    mov rax, r9
    or eax, 1
    xor edx, edx
    wrmsr

    call .Ltsc
    mov rbx, rax
    mov r10, [r14 + 0x38]
    mov edi, 0xfee00000
    # The local APIC: on, spurious interrupts at 0xff.
    mov dword ptr [rdi + 0xf0], 0x1ff
    cmp qword ptr [r14 + 0x30], 0
    je 2f
    test r15, r15
    jnz 2f
    # The first processor takes what the PIC says, which is about the PIT alone.
    mov dword ptr [rdi + 0x350], 0x700
    mov al, 0x11
    out 0x20, al
    mov al, 0x40
    out 0x21, al
    mov al, 4
    out 0x21, al
    mov al, 1
    out 0x21, al
    mov al, 0xfe
    out 0x21, al
    mov al, 0x34
    out 0x43, al
    mov rax, [r14 + 0x30]
    out 0x40, al
    mov al, ah
    out 0x40, al
    jmp 3f
2:
    # Its timer: periodic, undivided.
    mov dword ptr [rdi + 0x3e0], 0xb
    mov dword ptr [rdi + 0x320], 0x20040
    mov rax, [r14 + 0x28]
    mov [rdi + 0x380], eax
3:
    sti
    hlt
    cli
    call .Lclock
    cmp rax, r8
    jae 4f
    inc rbp
4:
    mov r8, rax
    cmp r12, r10
    jb 3b
    add r10, [r14 + 0x38]
    lea rsi, [rip + .Ltimer_name]
    call .Lbegin_line
    lea rsi, [rip + .Lclock_name]
    mov rax, r8
    call .Lfield
    call .Lend_line
    jmp 3b

# KVM's clock in nanoseconds: to rax. Loses rcx, rdx, rsi.
.Lclock:
    mov esi, [r9]
    test esi, 1
    jnz .Lclock
    call .Ltsc
    sub rax, [r9 + 8]
    mov cl, [r9 + 28]
    test cl, cl
    js 2f
    shl rax, cl
    jmp 3f
2:
    neg cl
    shr rax, cl
3:
    mov edx, [r9 + 24]
    mul rdx
    shrd rax, rdx, 32
    add rax, [r9 + 16]
    cmp esi, [r9]
    jne .Lclock
    ret

.Ltimer_tick:
    push rax
    push rdx
    call .Ltsc
    cmp rax, rbx
    jae 2f
    inc rbp
2:
    mov rbx, rax
    inc r12
    cmp qword ptr [r14 + 0x30], 0
    je 3f
    test r15, r15
    jnz 3f
    mov al, 0x20
    out 0x20, al
    jmp 4f
3:
    mov eax, 0xfee00000
    mov dword ptr [rax + 0xb0], 0
4:
    pop rdx
    pop rax
    iretq

.Ltimer_name: .asciz "timer"
.Lclock_name: .asciz " clock="
    .balign 8
